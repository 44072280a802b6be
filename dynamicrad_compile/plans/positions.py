"""Position tables: tensors whose values show the token grid of a sequence, as RoPE tables and coordinates do.

Each column of such a table depends on frame, row or column alone, so the distances after which columns first change
are 1, width and height x width.

Pictures of one size lie in a sequence as frames do: those to be edited behind the one to be made, layers, references.
Frames are told by their times (see `times`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from .times import Around, are_frames, around

Triple = tuple[int, int, int]
OfAxes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

MIN_NUMBERED = 5
"""Pictures to be edited may have the numbers 0, 1, 2, 3, as so few frames have."""


class Decoded(NamedTuple):
    """What a table shows: (pictures, height, width), and for each of the three a column that tells it.

    of_axes  for each of the three all columns that depend on it
    numbers  its columns are the numbers of picture, row and column, not sines and cosines of them
    around   references around the frames; None where the pictures are no frames
    """

    grid: Triple
    columns: Triple
    of_axes: OfAxes
    numbers: bool = False
    around: Around | None = Around(0, 0)

    @property
    def video(self) -> Triple:
        """(frames, height, width) without the references."""
        pictures, height, width = self.grid
        return pictures - sum(self.around or ()), height, width

    @property
    def checked(self) -> tuple[OfAxes, bool, tuple[int, int]]:
        """What `frames_in` takes behind table and grid."""
        return self.of_axes, self.numbers, tuple(self.around or (0, 0))  # type: ignore[return-value]

    @property
    def tokens_around(self) -> tuple[int, int]:
        """Tokens of the references in front of the frames and behind them."""
        before, after = self.around or (0, 0)
        area = self.grid[1] * self.grid[2]
        return before * area, after * area


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
    cube = table.reshape(*grid, -1)
    differs = torch.stack([(cube != cube.narrow(d, 0, 1)).flatten(0, 2).any(0) for d in range(3)])  # [3, columns]
    if bool((differs.sum(0) > 1).any()):
        return []
    columns: list[int] = []
    for d in range(3):
        line = cube.movedim(d, 0)[1:, 0, 0]
        usable = (differs[d] & (line != cube[0, 0, 0]).all(0)).nonzero().flatten()
        if grid[d] > 1 and not len(usable):
            return []
        columns.append(int(varying[usable[0]]) if grid[d] > 1 else constant or 0)
    pictures, rows, places = (cube.movedim(d, 0)[:, 0, 0, differs[d]] for d in range(3))
    numbers = len(varying) == 3
    of_axes = tuple(tuple(varying[differs[d]].tolist()) for d in range(3))
    stand = around(pictures, numbers, (rows, places))
    return [Decoded(grid, (columns[0], columns[1], columns[2]), of_axes, numbers, stand)]  # type: ignore[arg-type]


def frames_in(
    table: torch.Tensor, grid: Triple, of_axes: OfAxes, numbers: bool, references: tuple[int, int]
) -> torch.Tensor:
    """Whether the pictures of `grid` in a table [tokens, columns] are frames, with so many references around them.

    of_axes, numbers  as in `Decoded`
    Returns a bool [].
    """
    starts = grid[1] * grid[2], grid[2], 1
    pictures, *others = (
        table[: n * step : step, list(columns)] for n, step, columns in zip(grid, starts, of_axes, strict=True)
    )
    return are_frames(pictures, numbers, others, references)


def times_of(table: torch.Tensor, found: Decoded) -> torch.Tensor:
    """The numbers of the pictures [n] in a table of numbers."""
    return table[:: found.grid[1] * found.grid[2], found.columns[0]]


def may_be_pictures(found: Decoded) -> bool:
    """Whether frames are numbered, and too few to tell them from pictures."""
    return found.numbers and found.around is not None and 1 < found.video[0] < MIN_NUMBERED


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
