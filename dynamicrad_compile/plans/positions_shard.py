"""Grids shown by some rows of a position table, as one process has them under context parallelism.

Token i of a raster grid is in frame i // (H W), row i // W % H and column i % W. Where rows of a table are in three
frames, one of these is whole: its rows and columns are seen to come again in the next. What comes again after which
distance tells W, H W and which columns of the table mean what, so no other grid of as many tokens has the same rows.
Rows in fewer frames tell nothing.

Each process sees other rows, so each finds the same grid or none. Of the rows in front of its own it knows the number,
and times tell how many frames are there: so text or references in front are no frames, however many. That the rows
behind go on in the same way can't be seen.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch

from .layout import MIN_FRAMES
from .packed import is_of_positions
from .positions import MIN_NUMBERED, OfAxes, Triple
from .times import are_frames

UNEVEN, LEAST_TURN, COUNT_OFF = 0.15, 2e-3, 0.2
"""Steps of times differ by a share of them, and slower columns tell none, where sines are rounded to bfloat16; a count
of frames is so much off then."""


class DecodedShard(NamedTuple):
    """What the rows start..start + n of a table of frames x height x width tokens show.

    grid     (frames, height, width) of all tokens
    columns  for each of the three a column that tells it
    of_axes  for each of the three all columns that depend on it
    numbers  its columns are the numbers of frame, row and column, not sines and cosines of them
    start    the token of the first row
    """

    grid: Triple
    columns: Triple
    of_axes: OfAxes
    numbers: bool
    start: int

    @property
    def tokens_around(self) -> tuple[int, int]:
        """Of the whole table, all tokens are those of the grid."""
        return 0, 0


def tells(grid: Triple, start: int, stop: int) -> bool:
    """Whether tokens start..stop are enough to tell a grid: some of three frames, of 2 x 2 places at least."""
    _, height, width = grid
    return min(height, width) > 1 and len(_shown_frames(grid, start, stop)) >= MIN_FRAMES


def decode_shard(table: torch.Tensor, start: int, tokens: int) -> DecodedShard | None:
    """The raster grid of `tokens` tokens that rows start..start + n of its table, [n, columns], show.

    None where they show none, or more than one, where there are too few of them, or where pictures of one size are no
    frames by their times.
    """
    if not is_of_positions(table):
        return None
    table = table.detach().cpu()
    varying = (table != table[:1]).any(0).nonzero().flatten()
    changes = (table[1:] != table[:-1]).numpy()
    periods = {int(np.gcd.reduce(np.flatnonzero(changes[:, c]) + start + 1)) for c in varying.tolist()}
    fits = []
    for width, area in itertools.combinations(sorted(periods - {1}), 2):
        grid = tokens // area, area // width, width
        if not tokens % area and not area % width and tells(grid, start, start + len(table)):
            fits += _fit(table, grid, varying, start)
    return fits[0] if len(fits) == 1 else None


def _fit(table: torch.Tensor, grid: Triple, varying: torch.Tensor, start: int) -> list[DecodedShard]:
    """The grid, if each column depends on one axis of it, each axis has a column that tells it, and frames are such."""
    numbers = len(varying) == 3
    if numbers and grid[0] < MIN_NUMBERED:
        return []
    columns, of_axes = [], []
    for first, place in _lines(grid, start, start + len(table), table.device):
        alone = [c for c in varying.tolist() if bool((table[:, c] == table[first, c][place]).all())]
        telling = [c for c in alone if bool(_all_differ(table[first, c]))]
        if not telling:
            return []
        columns.append(telling[0])
        of_axes.append(tuple(alone))
    if sorted(itertools.chain(*of_axes)) != varying.tolist():
        return []
    found = DecodedShard(grid, tuple(columns), tuple(of_axes), numbers, start)  # type: ignore[arg-type]
    return [found] if bool(shows_shard(table, *found)) else []


def shows_shard(
    table: torch.Tensor, grid: Triple, columns: Triple, of_axes: OfAxes, numbers: bool, start: int
) -> torch.Tensor:
    """bool []: whether rows [n, columns] of a table show such a grid; see `DecodedShard`. Nothing waits for the host.

    A column must be the same along the other two axes, and different at each two places of its own. Times must count
    the frames in front.
    """
    checks, shown = [], []
    lines = _lines(grid, start, start + len(table), table.device)
    for (first, place), column, others in zip(lines, columns, of_axes, strict=True):
        values = table[:, column]
        line = values[first]
        checks += [(values == line[place]).all(), _all_differ(line)]
        shown.append(table[first][:, list(others)])
    frames, *rest = shown
    checks += [are_frames(frames, numbers, rest, (0, 0)), _count(frames, numbers, start // (grid[1] * grid[2]))]
    return torch.stack(checks).all()


def _count(frames: torch.Tensor, numbers: bool, before: int) -> torch.Tensor:
    """bool []: whether times [frames, columns] are those behind `before` frames that begin at time 0.

    A column is of numbers, or of cosines or sines of even steps; columns that tell it must agree.
    """
    if not before:
        return torch.ones((), dtype=torch.bool, device=frames.device)
    lines = frames.double()
    angles = lines[None] if numbers else torch.stack([lines.clamp(-1, 1).acos(), lines.clamp(-1, 1).asin()])
    mean = (angles[:, -1] - angles[:, 0]) / (len(lines) - 1)
    step = mean.abs()
    even = ((angles[:, 1:] - angles[:, :-1] - mean[:, None]).abs() <= UNEVEN * step[:, None]).all(1)
    told = even & (step >= LEAST_TURN)
    off = mean.sign() * angles[:, 0] - before * step
    if not numbers:  # a cosine is the same a whole turn further on, a sine but for its sign half a turn
        turns = zip(off, (2 * torch.pi, torch.pi), strict=True)
        off = torch.stack([one - turn * (one / turn).round() for one, turn in turns])
    near = told & (off.abs() <= COUNT_OFF * step)
    return near.any() & (near.any(0) | ~told.any(0)).all()


def _all_differ(line: torch.Tensor) -> torch.Tensor:
    return (line[:, None] == line).sum() == len(line)


def _shown_frames(grid: Triple, start: int, stop: int) -> range:
    area = grid[1] * grid[2]
    return range(start // area, (stop - 1) // area + 1)


def _lines(grid: Triple, start: int, stop: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For frames, rows and columns: the first of the tokens start..stop in each, [places], and the place of each token.

    Tokens count from `start`, frames from the first that is shown. At least one frame is whole. Both are int64.
    """
    _, height, width = grid
    frames, area = _shown_frames(grid, start, stop), height * width
    f, h, w = (torch.arange(n, device=device) for n in (len(frames), height, width))
    token = torch.arange(start, stop, device=device)
    lines = start // width  # in front of the line of the first token
    return [
        (((frames.start + f) * area - start).clamp_min(0), token // area - frames.start),
        (((lines + (h - lines) % height) * width - start).clamp_min(0), token // width % height),
        ((w - start) % width, token % width),
    ]
