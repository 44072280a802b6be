"""Row-major reshape of labels."""

from __future__ import annotations

from collections.abc import Sequence

from dynamicrad_compile.reporting.reason import SET_GRID, Reason

from .concatenation import settled
from .labels import Axis, Label, Source, fresh, label_size, take


def reshape(labels: Sequence[Label], sizes: Sequence[int], source: Source) -> list[Label]:
    """Labels after a row-major reshape to `sizes`.

    Axes are regrouped; an axis is split where a new dimension needs only its leading part. Dimensions that can't
    be expressed get fresh labels, and the walk goes on behind them.
    """
    before = [label_size(label) for label in labels]
    if 0 in sizes or 0 in before:
        return [fresh(n, Source(source.node, d, source.kind)) for d, n in enumerate(sizes)]
    first = next(
        (d for d, (a, b) in enumerate(zip(before, sizes, strict=False)) if a != b), min(len(before), len(sizes))
    )
    leaves = [leaf for label in labels[first:] for leaf in settled(label)]
    out: list[Label] = list(labels[:first])
    d = first
    while d < len(sizes):
        attempt = list(leaves)
        label = take(attempt, sizes[d], source.node)
        if label is not None:
            leaves = attempt
            out.append(label)
            d += 1
            continue
        end, skipped = _realign(leaves, sizes, d)
        for k in range(d, end):
            new = fresh(sizes[k], Source(source.node, k, source.kind))
            for axis in new:
                text = f"reshape at {source.node} cuts across {[leaf.size for leaf in leaves[:skipped]]}"
                axis.conflict = Reason("reshape_cuts_across", text, SET_GRID)
                axis.feature = bool(skipped) and all(leaf.feature for leaf in leaves[:skipped])
            out.append(new)
        leaves = leaves[skipped:]
        d = end
    return out


def _realign(leaves: Sequence[Axis], sizes: Sequence[int], d: int) -> tuple[int, int]:
    """(next dimension, axes passed) of the first boundary common to both sides, past dimension `d`."""
    ends: dict[int, int] = {}
    total = 1
    for count, leaf in enumerate(leaves, 1):
        total *= leaf.size
        ends.setdefault(total, count)
    total = 1
    for k in range(d, len(sizes)):
        total *= sizes[k]
        if total in ends:
            return k + 1, ends[total]
    return len(sizes), len(leaves)
