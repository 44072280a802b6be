"""What is learnt when two labels turn out to be of one dimension: their axes are the same, or split alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from dynamicrad_compile.reporting.reason import KEEP_ORDER, Reason

from .concatenation import concat, parts_of, rows_of, same_part, settled
from .labels import (
    Axis,
    Label,
    Part,
    Source,
    Within,
    are_mirrored,
    is_free,
    label_size,
    mend,
    mixed,
    resolve,
    split,
    take,
)


def unify(first: Label, second: Label, why: str) -> Label:
    """The label of a dimension that is both `first` and `second` (they have the same size), in the node `why`.

    Where they contradict each other the label is a new axis of mixed rows, and neither of the two is in doubt.
    """
    if mixed(first) or mixed(second):
        return first if mixed(first) else second
    if is_free(first) or is_free(second):
        return second if is_free(first) else first
    if _align_bases(first, second, why):
        return first
    first, second = tuple(first), tuple(second)  # of which rows they are is not the same
    _carve(first, second)
    left, right = list(settled(first)), list(settled(second))
    while left and right:
        x, y = left[0], right[0]
        if x is not y and (x in right or y in left):  # one of them stands at two places
            return _disagreement(first, second, why)
        if x is y or x.size == y.size:
            if x is not y and not _merge(x, y, why):
                return _disagreement(first, second, why)
            left.pop(0)
            right.pop(0)
            continue
        big, small = (left, right) if x.size > y.size else (right, left)
        halves = split(big[0], small[0].size, why) if small[0].size else None
        if halves is not None:
            big[:1] = [*halves[0], *halves[1]]
            continue
        inner = list(small)
        taken = take(inner, big[0].size, why) if big[0].parts else None
        if taken is None or not _regard(big[0], taken, why):
            return _disagreement(first, second, why)
        big[:1], small[:] = [], inner
    return first


def _align_bases(first: Label, second: Label, why: str) -> bool:
    """Whether two labels are the same rows of the same, one of them what one row of an axis holds.

    Where the same rows of two inputs of one size are aligned, the inputs are: RoPE that is applied chunk by chunk.

    What a graph has put together itself, text and video, is divided into these pieces instead (`_carve`).
    """
    one, other = _rows(first), _rows(second)
    if one is None or other is None or (one.start, one.stop) != (other.start, other.stop):
        return False
    x, y = resolve(one.label), resolve(other.label)
    given = all(axis.source.kind == "input" for axis in (*x, *y))
    if given and label_size(x) == label_size(y) and not set(x) & set(y):
        unify(x, y, why)
    return same_part(one, other) and any(isinstance(label, Within) for label in (first, second))


def _rows(label: Label) -> Part | None:
    """Of which rows of what a label is, where that is not put together from pieces itself; None if it is not."""
    leaves = resolve(label)
    parts = leaves[0].parts if len(leaves) == 1 and leaves[0].shard is None else None
    if isinstance(label, Within):
        parts = (label.part,)
    if not parts or len(parts) != 1 or parts[0].whole:
        return None
    return None if any(leaf.parts or leaf.blank for leaf in resolve(parts[0].label)) else parts[0]


def _carve(first: Label, second: Label) -> None:
    """Divide axes of which some rows are about to be aligned with rows of something else.

    Text that is cut off before RoPE and put back, and the sequence that it was cut from, are then the same pieces.
    """
    _find_pieces(first, second)
    slices = [(axis, base) for label in (first, second) for axis in resolve(label) if (base := _base(axis)) is not None]
    bases = [base for _, base in slices]
    held = {leaf for axis in (*resolve(first), *resolve(second)) if _base(axis) is None for leaf in _leaves(axis)}
    for axis, base in slices:
        if bases.count(base) == 1 and base not in held:
            (part,) = axis.parts or ()
            source = replace(base.source, kind="op")
            sizes = (part.start, part.size, base.size - part.stop)
            pieces = [Axis(n, source) for n in sizes]
            for piece in pieces:
                piece.blank, piece.feature, piece.why = base.blank, base.feature, base.why
            labels: list[Label] = [(piece,) if piece.size > 1 else () for piece in pieces]
            base.parts = tuple(Part(label, 0, n) for label, n in zip(labels, sizes, strict=True) if n)
            base.carved = True
            pieces[1].kin = (axis, *axis.kin)
            axis.alias = pieces[1]


def _find_pieces(first: Label, second: Label) -> None:
    """Of two slices that were cut alike: each is the piece into which what it was cut from has been divided since.

    The first rows of tables may be cut alike and mean frames here, rows or columns there.
    """
    slices = [axis for label in (first, second) for axis in resolve(label)]
    cuts = {
        (part.start, part.stop, label_size(part.label))
        for axis in slices
        for part in (axis.parts if axis.parts and len(axis.parts) == 1 else [Part((), 0, 1)])
    }
    if len(slices) != 2 or len(cuts) != 1 or min(cuts)[0] == 0 or any(axis.shard for axis in slices):
        return
    for axis in slices:
        rows = parts_of((axis,))
        if axis.parts and not axis.parts[0].whole and len(rows) == 1 and rows[0].whole:
            axis.parts, axis.factors = None, resolve(rows[0].label)


def _base(axis: Axis) -> Axis | None:
    """The axis, not divided so far, of which an axis is some of the rows; None if it is not."""
    if axis.parts is None or len(axis.parts) != 1 or axis.parts[0].whole or axis.shard is not None:
        return None
    leaves = resolve(axis.parts[0].label)
    return leaves[0] if len(leaves) == 1 and not leaves[0].parts and not leaves[0].blank else None


def _leaves(axis: Axis) -> set[Axis]:
    """The axis and all that it is put together from."""
    inner = {leaf for part in axis.parts or () for one in resolve(part.label) for leaf in _leaves(one)}
    return {axis, *inner}


def _disagreement(first: Label, second: Label, why: str) -> Label:
    sizes = (" x ".join(str(axis.size) for axis in resolve(label)) for label in (first, second))
    sources = (", ".join(dict.fromkeys(str(axis.source) for axis in resolve(label))) for label in (first, second))
    (left, right), (one, other) = sizes, sources
    text = f"{why} puts tokens of two orders together, {left} ({one}) and {right} ({other})"
    axis = Axis(label_size(first), Source(why, 0, "op"))
    axis.mixed = Reason("axes_disagree", text, KEEP_ORDER)
    return (axis,)


def _regard(joined: Axis, label: Label, why: str) -> bool:
    """Learn that a concatenation, or a slice, has the positions of a product of axes; False where it has not."""
    pieces = parts_of((joined,))
    unknown = [resolve(piece.label) for piece in pieces]
    if len(pieces) > 1 and any(len(x) > 1 for x in unknown):  # of which the places within a frame may be the label's
        if _holds(joined, label[0]) or not _join_frames(pieces, label, why):
            return False
        joined.parts, joined.factors = None, label
        return True
    if any(_holds(joined, axis) for axis in label) and not (len(pieces) == 1 and pieces[0].whole):
        return False
    if len(pieces) == 1:
        if pieces[0].whole and unknown[0] != resolve(label):
            return False
        joined.parts, joined.factors = None, label
        return True
    if any(not piece.whole or set(x) & set(label) for x, piece in zip(unknown, pieces, strict=True)):
        return False
    offset = 0
    for axes, piece in zip(unknown, pieces, strict=True):
        for axis in axes:
            axis.parts = rows_of(label, offset, offset + piece.size)
        offset += piece.size
    return True


def _join_frames(pieces: Sequence[Part], label: Label, why: str) -> bool:
    """Learn that pieces are rows of a product's first axis, as a picture in front of frames is one more frame."""
    first, inner = label[:1], label[1:]
    area = label_size(inner)
    if area == 1 or any(not piece.whole or piece.size % area for piece in pieces):
        return False
    fronts: list[Part] = []
    for piece in pieces:
        leaves, n = list(resolve(piece.label)), piece.size // area
        front = take(leaves, n, why)
        if front is None or mixed(unify(tuple(leaves), inner, why)):
            return False
        fronts.append(Part(front, 0, n))
    return not mixed(unify(first, concat(fronts, Source(why, 0, "op")), why))


def _merge(x: Axis, y: Axis, why: str) -> bool:
    """Make two leaf axes of one size one axis, unless one is the other in reverse order; False if they can't be."""
    if (x.mirror or y.mirror or x.parent or y.parent) and are_mirrored((x,), (y,)):
        return True
    if x.shard is not None and y.shard is not None and not _merge_sequences(x.shard.rows, y.shard.rows, why):
        return False
    if x.parts and y.parts and min(len(x.parts), len(y.parts)) > 1:
        if not _are_cut_alike(x, y):
            return not _stand_elsewhere(x.parts, y.parts)
        for a, b in zip(parts_of((x,)), parts_of((y,)), strict=False):
            if a.whole and b.whole and a.size == b.size and mixed(unify(a.label, b.label, why)):
                return False
    keep, drop = (x, y) if _rank(x) >= _rank(y) else (y, x)
    if _holds(keep, drop):  # rows of an axis, put together again and aligned with it
        keep, drop = drop, keep
    if _holds(keep, drop):
        return False
    keep.conflict = keep.conflict or drop.conflict
    keep.why = keep.why or drop.why
    keep.mirror = keep.mirror or drop.mirror
    keep.shard = keep.shard or drop.shard
    keep.feature = keep.feature or drop.feature
    keep.kin = (*keep.kin, drop, *drop.kin)
    drop.alias = keep
    return True


def _merge_sequences(x: Part, y: Part, why: str) -> bool:
    """Learn that two sequences of which a process aligns its rows are one: all processes run the same program."""
    if (x.start, x.stop, label_size(x.label)) != (y.start, y.stop, label_size(y.label)):
        return True
    return not mixed(unify(x.label, y.label, why))


def _stand_elsewhere(first: Sequence[Part], second: Sequence[Part]) -> bool:
    """Whether two concatenations have a piece in common, at different places."""
    places: list[dict[Label, int]] = []
    for parts in (first, second):
        ends = itertools.accumulate(part.size for part in parts)
        places.append({resolve(part.label): end for part, end in zip(parts, ends, strict=True) if part.whole})
    return any(places[0][label] != places[1][label] for label in places[0].keys() & places[1].keys() if label)


def _are_cut_alike(x: Axis, y: Axis) -> bool:
    """Whether two axes have pieces of the same sizes, or one of them only by rows that were aligned before."""
    if [p.size for p in parts_of((x,))] == [p.size for p in parts_of((y,))]:
        return True
    for axis in (x, y):
        if axis.carved:
            mend(axis)
    return x.parts is None or y.parts is None


def _holds(axis: Axis, inner: Axis) -> bool:
    """Whether `inner` is among the pieces of `axis`."""
    leaves = (leaf for part in axis.parts or () for leaf in resolve(part.label))
    return any(leaf is inner or _holds(leaf, inner) for leaf in leaves)


def _rank(axis: Axis) -> tuple[bool, bool, bool, bool, bool, int]:
    """Which of two merged axes says more: a shard, a concatenation, an input, a slice, anything, a new buffer."""
    pieces = len(axis.parts or ())
    return (
        axis.shard is not None,
        pieces > 1,
        axis.source.kind == "input",
        pieces == 1,
        not axis.blank,
        axis.source.rank,
    )
