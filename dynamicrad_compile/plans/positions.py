"""Position tables: tensors whose values show the token grid of a sequence, as RoPE tables and coordinates do.

Each column of such a table depends on frame, row or column alone, so the distances after which columns first change
are 1, width and height x width.

Pictures of one size lie in a sequence as frames do: those to be edited behind the one to be made, or layers. Frames go
on in time by equal steps, no longer than those of rows and columns; the first may last shorter.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

Triple = tuple[int, int, int]

MIN_NUMBERED = 5
"""Pictures to be edited may have the numbers 0, 1, 2, 3, as so few frames have."""


class Decoded(NamedTuple):
    """What a table shows: (frames, height, width), and for each of the three a column that tells it.

    numbers  its columns are the numbers of frame, row and column, not sines and cosines of them
    ordered  the column of frames rises, or falls, from each frame to the next
    """

    grid: Triple
    columns: Triple
    numbers: bool = False
    ordered: bool = False


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
    if picked is None:
        return []
    f, h, w = (constant if i is None else int(varying[i]) for i in picked)
    ordered = picked[0] is not None and bool(in_order(table.reshape(*grid, -1)[:, 0, 0, picked[0]]))
    return [Decoded(grid, (f, h, w), len(varying) == 3, ordered)]  # type: ignore[arg-type]


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
        ordered = in_order(cube.movedim(d, 0)[:, 0, 0, usable]).to(torch.uint8)
        # The first that rises or falls all the way, else the first.
        columns.append(int(usable[int(ordered.argmax())]) if grid[d] > 1 else None)
    return columns


def in_order(line: torch.Tensor) -> torch.Tensor:
    """Whether values [n, ...] rise, or fall, from each to the next; bool [...]."""
    later, earlier = line[1:], line[:-1]
    return (later > earlier).all(0) | (later < earlier).all(0)


def follow(time: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Whether numbers of frames [F] go on in time, by no longer steps than rows [H] or columns [W]; bool []."""
    longest = [(x[1:] - x[:-1]).abs().amax() for x in (time, row, column)]
    return in_order(time) & (longest[0] <= torch.maximum(longest[1], longest[2]))


def times_of(table: torch.Tensor, found: Decoded) -> torch.Tensor:
    """The numbers of the frames [F] in a table of numbers."""
    return table.reshape(*found.grid, -1)[:, 0, 0, found.columns[0]]


def are_frames(table: torch.Tensor, found: Decoded) -> bool:
    """Whether what a table [tokens, columns] shows may be frames; pictures of one size are told by their times."""
    cube = table.reshape(*found.grid, -1)
    if len(cube) == 1:
        return True
    if found.numbers:
        lines = (cube.movedim(d, 0)[:, 0, 0, column] for d, column in enumerate(found.columns))
        return bool(follow(*lines)) if min(found.grid) > 1 else True
    lines = cube[:, 0, 0][:, (cube != cube[:1]).flatten(0, 2).any(0)]  # [frames, columns of frames]
    distinct = bool((lines[1:] != lines[:-1]).any(1).all())
    even = len(cube) > 3 and _evenly_spaced(lines)
    return distinct and (even or (bool(in_order(lines).any()) and _evenly_spaced(lines[1:])))


def may_be_pictures(found: Decoded) -> bool:
    """Whether frames are numbered, and too few to tell them from pictures."""
    return found.numbers and 1 < found.grid[0] < MIN_NUMBERED


def _evenly_spaced(lines: torch.Tensor) -> bool:
    """Whether sines and cosines of numbers [n, columns] go on by equal steps; True for less than four.

    Then c(i + 1) + c(i - 1) = K c(i) in each column, with one K. Tables in bfloat16 are 2^-9 off.
    """
    lines = lines.double()
    both = lines[2:] + lines[:-2]
    off = both[:1] * lines[1:-1] - lines[1:2] * both
    return bool((off.abs() <= 0.02 * lines.abs().amax(0).square()).all())


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


def previous_frame(grid: Triple) -> torch.Tensor:
    """int64 [tokens]: for each token the one at its place in the frame before, itself in the first frame."""
    frames, height, width = grid
    token = torch.arange(frames * height * width, device="cpu")
    return torch.where(token < height * width, token, token - height * width)


def go_on(table: torch.Tensor, columns: torch.Tensor, previous: torch.Tensor, ordered: torch.Tensor) -> torch.Tensor:
    """bool [K]: whether the frames of each of K grids go on in time in a table [tokens, columns]; pictures may not.

    columns  int64 [K] of frames
    previous int64 [tokens, K], previous_frame of each grid
    ordered  bool [K], whether the column rises or falls in a video; nothing is said of the others
    """
    values = table[:, columns]
    before = values.gather(0, previous)
    first = previous == torch.arange(len(previous), device=previous.device)[:, None]
    rises, falls = (first | (values > before)).all(0), (first | (values < before)).all(0)
    return rises | falls | ~ordered
