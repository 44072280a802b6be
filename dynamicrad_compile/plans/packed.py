"""A video among other tokens, found in the positions of all of them: [others | frames x height x width | others].

A packed sequence holds text, audio, pictures and videos one behind the other, and one table has the positions of all
rows. The rows of a video are pictures of one size that follow each other: in each, columns of rows and columns repeat
and columns of time stand still; from one to the next, time goes on by the steps of frames (`plans.steps`). What is
in front of it and behind it is no part of its grid: text, audio, references, another video.

Of several videos it is the longest, of equally long ones the last. Pictures beside each other at one time are pieces of
a larger one (a tiled order): then there is no grid.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .layout import MIN_FRAMES
from .positions import Decoded, Triple, decode_table
from .steps import angles, are_one_more, go_on, longest_run, may_be_names, times_of_angles

MAX_PERIODS = 16
"""So many lengths of a picture are tried, those that cover most rows first."""
MAX_COLUMNS = 4096
"""A wider table is none of positions."""
SAMPLES = 512
"""Neighbouring rows that are looked at to tell a table of positions from other tensors."""


class Packed(NamedTuple):
    """A video in a table of `tokens` positions.

    grid     (frames, height, width)
    columns  for each of the three a column that tells it
    numbers  the column of frames holds numbers, not sines or cosines of them
    start    its first token
    doubt    its frames may be pictures, whose numbers follow each other as frames do (`steps.may_be_names`)
    """

    grid: Triple
    columns: Triple
    numbers: bool
    start: int
    tokens: int
    doubt: bool = False

    @property
    def video(self) -> Triple:
        """(frames, height, width)."""
        return self.grid

    @property
    def tokens_around(self) -> tuple[int, int]:
        """Tokens of the table in front of the video and behind it."""
        return self.start, self.tokens - self.start - math.prod(self.grid)


def shows_video(table: torch.Tensor, grid: Triple, columns: Triple, numbers: bool, start: int) -> torch.Tensor:
    """bool []: whether a table [tokens, columns] still shows such a video; see `Packed`. Nothing waits for the host."""
    rows = table.narrow(0, start, math.prod(grid))
    checks, lines = [], []
    for d, column in enumerate(columns):
        cube = rows.select(1, column).reshape(grid)
        line = functools.reduce(lambda x, k: x.narrow(k, 0, 1) if k != d else x, range(3), cube)
        checks.append((cube == line).all())
        checks.append((line.narrow(d, 1, grid[d] - 1) != line.narrow(d, 0, 1)).all())
        lines.append(line.flatten())
    times = lines[0] if numbers else angles(lines[0])
    longest = torch.stack([(line[1:] - line[:-1]).abs().amax() for line in lines[1:]]).amax()
    return torch.stack([*checks, go_on(times), ~may_be_names(times, numbers, longest)]).all()


class _Lines(NamedTuple):
    """Values [n, m] of the m columns of a table that tell n times, rows or columns of pictures."""

    values: torch.Tensor
    columns: torch.Tensor

    def meet(self, other: _Lines) -> bool:
        """Whether a line of one is a line of the other, as far as both know of it."""
        mine, theirs = torch.isin(self.columns, other.columns), torch.isin(other.columns, self.columns)
        return bool((self.values[:, None, mine] == other.values[None, :, theirs]).all(-1).any())


@dataclass(frozen=True)
class _Pictures:
    """Pictures of one size, one behind the other.

    start    first row of the first picture
    found    one picture as a grid of one frame
    times    of the columns that stand still in each picture
    lines    of rows and of columns of a picture
    """

    start: int
    found: Decoded
    times: _Lines
    lines: tuple[_Lines, _Lines]

    @property
    def stop(self) -> int:
        """Behind its last row."""
        return self.start + len(self.times.values) * self.found.grid[1] * self.found.grid[2]

    def beside(self, other: _Pictures) -> bool:
        """Whether another's pictures are at the same time as some of these, and at other places."""
        apart = [not a.meet(b) for a, b in zip(self.lines, other.lines, strict=True)]
        return any(apart) and self.times.meet(other.times)


def find_video(table: torch.Tensor) -> Packed | None:
    """The video in a table [tokens, columns] of positions.

    None where there is none of MIN_FRAMES frames and 2 x 2 places, or its tokens are in another order. The table must
    begin with a column of time, then one of rows, then one of columns: nothing else tells which is which.
    """
    if not is_of_positions(table):
        return None
    table = table.detach().cpu()
    kept = _distinct(table)
    table = table[:, kept]
    stacks = _stacks(table)
    videos = [(found, stack) for stack in stacks if (found := _video(stack, table)) is not None]
    if not videos:
        return None
    found, own = max(videos, key=lambda pair: (math.prod(pair[0].grid), pair[0].start))
    if any(own.beside(other) for other in stacks if other is not own):
        return None
    f, h, w = (int(kept[column]) for column in found.columns)
    return found._replace(columns=(f, h, w))


def is_of_positions(table: torch.Tensor) -> bool:
    """Whether neighbouring rows share numbers, as places in one picture do: a cheap look before a thorough one."""
    if len(table) < 4 * MIN_FRAMES or not 3 <= table.shape[1] <= MAX_COLUMNS or table.dtype == torch.bool:
        return False
    number = min(SAMPLES, len(table) - 1)
    rows = torch.arange(number, device=table.device) * (len(table) - 2) // max(1, number - 1)
    return bool((table[rows] == table[rows + 1]).any(1).double().mean() > 1 / 32)


def _distinct(table: torch.Tensor) -> torch.Tensor:
    """Numbers of the columns that are no copies of earlier ones."""
    some = table[:: max(1, len(table) // SAMPLES)].T
    _, like = some.unique(dim=0, return_inverse=True)
    number = torch.arange(len(like), device="cpu")
    first = torch.full_like(number, len(like)).scatter_reduce(0, like, number, "amin")[like]
    copies = (first != number) & (table == table[:, first]).all(0)
    return (~copies).nonzero().flatten()


def _stacks(table: torch.Tensor) -> list[_Pictures]:
    """All pictures of one size that stand one behind the other, two at least."""
    stacks: list[_Pictures] = []
    for period, phase in _periods(table):
        number = (len(table) - phase) // period
        cube = table[phase : phase + number * period].reshape(number, period, -1)
        varies = (cube != cube[:, :1]).any(1)
        like = ((cube[1:] == cube[:-1]) | ~varies[1:, None]).all(2).all(1) & (varies[1:] == varies[:-1]).all(1)
        ends = np.flatnonzero(~like.numpy()) + 1
        for first, last in zip([0, *ends.tolist()], [*ends.tolist(), number], strict=True):
            if last - first < 2 or int(varies[first].sum()) < 2:
                continue
            start = phase + first * period
            if any(s.start <= start < s.stop for s in stacks):
                continue
            found = decode_table(cube[first], single_frame=True)
            if found is None or found.grid[0] != 1:
                continue
            still = (~varies[first]).nonzero().flatten()
            plane = cube[first].reshape(*found.grid[1:], -1)
            times = _Lines(cube[first:last, 0, still], still)
            stacks.append(_Pictures(start, found, times, (_lines(plane), _lines(plane.transpose(0, 1)))))
    return stacks


def _lines(plane: torch.Tensor) -> _Lines:
    """Of the columns of a picture [n, m, columns] that vary along its first axis."""
    varies = (plane != plane[:1]).flatten(0, 1).any(0).nonzero().flatten()
    return _Lines(plane[:, 0, varies], varies)


def _periods(table: torch.Tensor) -> list[tuple[int, int]]:
    """(rows, first row modulo rows) of pictures that may stand one behind the other, those that cover most rows first.

    A column of time stands still for the rows of a picture, and for as many in the next.
    """
    covered: Counter[tuple[int, int]] = Counter()
    changes = (table[1:] != table[:-1]).T.numpy()
    for column in changes:
        starts = np.concatenate([[0], np.flatnonzero(column) + 1])
        lengths = np.diff(np.append(starts, len(table)))
        again = (lengths[1:] == lengths[:-1]) & (lengths[1:] >= 4)
        keys = np.stack([lengths[1:][again], starts[1:][again] % lengths[1:][again]], 1)
        for (length, phase), count in zip(*_counted(keys), strict=True):
            covered[length, phase] = max(covered[length, phase], length * count)
    return [key for key, _ in sorted(covered.items(), key=lambda item: (-item[1], -item[0][0]))][:MAX_PERIODS]


def _counted(keys: np.ndarray) -> tuple[list[tuple[int, int]], list[int]]:
    rows, counts = np.unique(keys, axis=0, return_counts=True)
    return [(int(a), int(b)) for a, b in rows], counts.tolist()


def _video(stack: _Pictures, table: torch.Tensor) -> Packed | None:
    """The longest video among pictures of one size."""
    lines, still = stack.times
    moving = (lines != lines[:1]).any(0).nonzero().flatten()
    in_order = [int(columns[0]) for columns in (still[moving], *(line.columns for line in stack.lines)) if len(columns)]
    if in_order != sorted(in_order) or not len(moving):
        return None
    _, height, width = stack.found.grid
    numbers = len(moving) == 1 and table.shape[1] - len(still) == 2
    chosen = 0 if numbers else times_of_angles(lines[:, moving])
    if chosen is None:
        return None
    told = lines[:, moving[chosen]]
    times = told.double() if numbers else angles(told)
    first, last = longest_run(times)
    if last - first < MIN_FRAMES or are_one_more(times, first, last):
        return None
    grid: Triple = (last - first, height, width)
    where = (int(still[moving[chosen]]), *stack.found.columns[1:])
    found = Packed(grid, where, numbers, stack.start + first * height * width, len(table))
    return found._replace(doubt=not bool(shows_video(table, *found[:4])))
