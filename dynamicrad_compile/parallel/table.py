"""The layouts of a simulation as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .simulation import Estimate, Simulation

HEADER = (
    "layout",
    "blocks a rank",
    "unequal",
    "moved",
    "memory",
    "attention",
    "moving",
    "step",
    "to dense",
    "to sparse",
)
NOTES = (
    "unequal: what the busiest rank has over the mean. moved: sent by a rank a step, and as much received. "
    "memory: q, k, v, output of a layer, and gathered keys and values.",
    "to dense, to sparse: speed-up over one GPU. dealt: heads and rows go to ranks by their work; "
    "other layouts are contiguous parts.",
)


def as_table(found: Simulation) -> str:
    """The simulation as text: assumptions, a line for each layout, what the columns are."""
    link = f"{found.link:g} GB/s each way between GPUs"
    if found.link == found.chip.link:
        link += f" ({found.chip.link_name})"
    best = found.best
    rows = [HEADER, *(_cells(one) for one in found.layouts)]
    marks = ["", *("  <- fastest as it is" * (one is best and len(rows) > 2) for one in found.layouts)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        + mark
        for row, mark in zip(rows, marks, strict=True)
    ]
    head = [
        f"{found.ranks} x {found.chip.name} on paper, {link}. All of it is estimated, nothing is measured.",
        f"a step on one GPU: dense {_time(found.dense_ms)}, sparse {_time(found.sparse_ms)}; {found.source}",
    ]
    if found.left_out:
        head.append(f"left out: {found.left_out} attentions whose shapes depend on data")
    return "\n".join([*head, "", *lines, "", *NOTES])


def _cells(one: Estimate) -> tuple[str, ...]:
    return (
        one.name,
        f"{one.blocks_mean:.3g}" if one.blocks_mean < 1000 else f"{one.blocks_mean:,.0f}",
        f"{one.imbalance:.1%}",
        _size(one.moved_bytes),
        _size(one.memory_bytes),
        _time(one.attention_ms),
        _time(one.moving_ms),
        _time(one.step_ms),
        f"{one.over_dense:.2f}x",
        f"{one.over_sparse:.2f}x",
    )


def _time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
