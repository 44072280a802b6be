"""Position tables: tensors whose values show the token grid of a sequence, as RoPE tables and coordinates do.

Each column of such a table depends on frame, row or column alone, so the distances after which columns first change
are 1, width and height x width.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

Triple = tuple[int, int, int]


class Decoded(NamedTuple):
    """What a table shows: (frames, height, width), and for each of the three a column that tells it."""

    grid: Triple
    columns: Triple


def columns_of(table: torch.Tensor, dim: int) -> torch.Tensor:
    """[tokens, columns] of a table with its tokens along `dim`; complex numbers count as two columns."""
    if table.is_complex():
        table = torch.view_as_real(table)
    return table.movedim(dim, 0).flatten(1) if table.dim() > 1 else table[:, None]


def decode_table(table: torch.Tensor, single_frame: bool = False) -> Decoded | None:
    """Grid of a table [tokens, columns] whose columns depend on one axis of a raster grid each.

    None if there is no such grid, or more than one. A `single_frame` is a grid only if asked for, and if the table has
    a column for frames, which is then constant.
    """
    tokens = table.shape[0]
    varies = (table != table[:1]).any(0)
    varying = varies.nonzero().flatten()
    if len(varying) < 2:
        return None
    table = table[:, varying]
    steps = sorted(set((table != table[:1]).to(torch.uint8).argmax(0).tolist()))
    if steps[0] != 1:
        return None
    fits = []
    for width, area in itertools.combinations([step for step in steps if step > 1], 2):
        if not area % width and not tokens % area:
            fits += _fit(table, (tokens // area, area // width, width), varying)
    constant = (~varies).nonzero().flatten()
    if single_frame and not fits and len(constant):
        for width in steps[1:]:
            if not tokens % width:
                fits += _fit(table, (1, tokens // width, width), varying, int(constant[0]))
    return fits[0] if len(fits) == 1 else None


def _fit(table: torch.Tensor, grid: Triple, varying: torch.Tensor, constant: int | None = None) -> list[Decoded]:
    """The grid, if each column of the table varies with one axis of it and each axis has a column that tells it."""
    picked = _one_axis_each(table, grid)
    columns = [constant if i is None else int(varying[i]) for i in picked or ()]
    return [Decoded(grid, (columns[0], columns[1], columns[2]))] if columns else []  # type: ignore[arg-type]


def _one_axis_each(table: torch.Tensor, grid: Triple) -> list[int | None] | None:
    """For each axis a column that varies with it alone and never comes back to its first value; else None.

    An axis of size 1 has None for its column.
    """
    cube = table.reshape(*grid, -1)
    differs = torch.stack([(cube != cube.narrow(d, 0, 1)).flatten(0, 2).any(0) for d in range(3)])  # [3, columns]
    if bool((differs.sum(0) > 1).any()):
        return None
    first = cube[0, 0, 0]
    columns: list[int | None] = []
    for d in range(3):
        line = cube.movedim(d, 0)[1:, 0, 0]
        usable = (differs[d] & (line != first).all(0)).nonzero().flatten()
        if grid[d] > 1 and not len(usable):
            return None
        columns.append(int(usable[0]) if grid[d] > 1 else None)
    return columns


def first_in_line(grid: Triple) -> torch.Tensor:
    """int64 [tokens, 3]: for each token, and each axis, the first token with the same place on that axis."""
    frames, height, width = grid
    f, h, w = (torch.arange(n, device="cpu") for n in (frames, height, width))
    return torch.stack(torch.meshgrid(f * height * width, h * width, w, indexing="ij"), -1).reshape(-1, 3)


def shows(table: torch.Tensor, columns: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    """bool [K]: which of K grids a table [tokens, columns] shows.

    columns  int64 [3, K], one for frames, height and width of each grid
    lines    int64 [tokens, 3, K], first_in_line of each grid

    A column must be the same along the other two axes, and different from its first value wherever its axis is.
    """
    values = table[:, columns]
    same = values == values.gather(0, lines)
    moved = (values != values[:1]) == (lines != 0)
    return (same & moved).all(0).all(0)
