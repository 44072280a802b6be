"""Position tables: inputs whose values show the grid of a sequence, as RoPE tables do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class PositionTable:
    """An input whose values show the grid.

    node      placeholder of the table
    dim       its dimension of tokens
    columns   columns (of the other dimensions, flattened) that change with frame, row and column of the grid
    grid      (frames, height, width) at compile time
    """

    node: fx.Node
    dim: int
    columns: tuple[int, int, int]
    grid: tuple[int, int, int]


def columns_of(table: torch.Tensor, dim: int) -> torch.Tensor:
    """[tokens, columns] of a table with its tokens along `dim`; complex numbers count as two columns."""
    if table.is_complex():
        table = torch.view_as_real(table)
    return table.movedim(dim, 0).flatten(1) if table.dim() > 1 else table[:, None]
