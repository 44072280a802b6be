"""Position tables: inputs whose values show the grid of a sequence, as RoPE tables do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dynamicrad_compile.plans.packed import Packed
from dynamicrad_compile.plans.positions import Decoded
from dynamicrad_compile.plans.positions_shard import DecodedShard

from .labels import Label


@dataclass(frozen=True)
class PositionTable:
    """An input whose values show the grid.

    node      placeholder of the table
    dim       its dimension of tokens
    shown     its grid, or a video among its tokens, and the columns that tell it (of the other dimensions, flattened),
              at compile time; a shard: the node holds only this process's rows
    varies    the graph serves other numbers of tokens too: the grid is known only when it runs
    """

    node: fx.Node
    dim: int
    shown: Decoded | Packed | DecodedShard
    varies: bool = False


def table_of(axes: Label) -> PositionTable | None:
    """The table from which a grid was read, None if it was in a shape."""
    return next((axis.table for axis in axes if axis.table is not None), None)


def is_of_shard(axes: Label) -> bool:
    """Whether a grid was read from rows of a table, which hold some of its tokens."""
    table = table_of(axes)
    return table is not None and isinstance(table.shown, DecodedShard)


def is_read_at_run_time(axes: Label) -> bool:
    """Whether a grid is known only when the graph runs, so that few frames may be followed by many."""
    table = table_of(axes)
    return table is not None and table.varies
