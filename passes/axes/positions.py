"""Position tables: inputs whose values show the grid of a sequence, as RoPE tables do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .labels import Label


@dataclass(frozen=True)
class PositionTable:
    """An input whose values show the grid.

    node      placeholder of the table
    dim       its dimension of tokens
    columns   columns (of the other dimensions, flattened) that change with frame, row and column of the grid
    grid      (frames, height, width) at compile time
    varies    the graph serves other numbers of tokens too: the grid is known only when it runs
    """

    node: fx.Node
    dim: int
    columns: tuple[int, int, int]
    grid: tuple[int, int, int]
    varies: bool = False


def table_of(axes: Label) -> PositionTable | None:
    """The table from which a grid was read, None if it was in a shape."""
    return next((axis.table for axis in axes if axis.table is not None), None)


def is_read_at_run_time(axes: Label) -> bool:
    """Whether a grid is known only when the graph runs, so that few frames may be followed by many."""
    table = table_of(axes)
    return table is not None and table.varies
