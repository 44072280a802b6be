"""The grid of a joined sequence, from the rows of its position table that this process holds.

In regional compilation under context parallelism a block's graph has this process's rows of the table as an input, and
puts the sequence together for its attention:

    %q, %rope : [1, S / n, H, D], [1, S / n, 1, D]    rows start..start + S / n of S
    %joined   : [1, S, H / n, D]                      all_to_all_single: of the S nothing is known in the graph

Other processes see other rows. Where these tell nothing their attention stays dense, which changes nothing for the
others: each computes heads or queries of its own. Nothing else may depend on what is read here, since all must send
alike: heads are not dealt by their work, and where the user gives the grid, no table is read.
"""

from __future__ import annotations

import torch
from torch import fx

from dynamicrad_compile.plans.packed import is_of_positions
from dynamicrad_compile.plans.positions import columns_of
from dynamicrad_compile.plans.positions_shard import decode_shard
from dynamicrad_compile.reporting.reason import SET_GRID, Reason

from ..axes.labels import Axis, Label, Part, label_size, resolve
from ..axes.positions import PositionTable


def joined_of(label: Label) -> tuple[Axis, Part] | None:
    """The sequence of which a dimension is this process's rows, and which rows; None if it is no undivided axis."""
    local = resolve(label)
    rows = local[0].shard.rows if len(local) == 1 and local[0].shard is not None else None
    whole = resolve(rows.label) if rows is not None else ()
    return None if rows is None or len(whole) != 1 or whole[0].parts else (whole[0], rows)


def table_of_shard(node: fx.Node, value: torch.Tensor, dim: int, joined: Axis, rows: Part) -> PositionTable | None:
    """The table of a joined sequence, if these rows of it show a grid; else the sequence notes why not."""
    table = columns_of(value.detach(), dim)
    found = decode_shard(table, rows.start, label_size(rows.label))
    if found is not None:
        return PositionTable(node, dim, found)
    if is_of_positions(table):
        text = (
            f"this process holds {rows.size} of its {joined.size} tokens, and their positions ({node.name}) do not "
            "tell the grid: they must be in three frames or more of nothing but a video"
        )
        joined.why = Reason("shard_shows_no_grid", text, SET_GRID)
    return None
