"""How pictures of one size follow each other in time: which of them are frames, and which are references.

A position table has one line of columns for each picture: numbers, angles, or sines and cosines of them. Frames of a
video go on by equal steps, no longer than those of rows and columns where both are numbers; the first frame may last
shorter. Of equal steps c(i + 1) + c(i - 1) = K c(i) in each column, with one K; of numbers K = 2.

Pictures off these steps, in front of the frames or behind them, are references: a face, a first picture, a style. A
picture that is one step before the first frame or behind the last is none: then numbers are names of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

EVEN = 0.02
"""Sines and cosines in bfloat16 are 2^-9 off, and three of them make a step."""


class Around(NamedTuple):
    """References in front of the frames and behind them, as numbers of pictures."""

    before: int
    after: int


class _Steps(NamedTuple):
    """Of lines [n, columns]: K, how far off a line may be (both [columns]), and which columns tell steps at all."""

    turn: torch.Tensor
    allowed: torch.Tensor
    tells: torch.Tensor


def around(lines: torch.Tensor, numbers: bool, others: Sequence[torch.Tensor]) -> Around | None:
    """References around the frames in lines [pictures, columns]; None where there are no frames, or too few of them.

    numbers  the one column holds numbers
    others   lines of rows and of columns of a picture, for `are_frames`
    """
    none = Around(0, 0)
    if bool(are_frames(lines, numbers, others, none)):
        return none
    size = 3 if numbers else 4
    even = [_is_even(lines[i : i + size], numbers) for i in range(len(lines) - size + 1)]
    ends, run = [], 0
    for i, one in enumerate(even):
        run = run + 1 if one else 0
        ends.append((run, i))
    run, last = max(ends, default=(0, 0), key=lambda pair: pair[0])
    found = Around(last - run + 1, len(lines) - last - size)
    few = not run or 2 * sum(found) > run + size - 1
    return None if few or not bool(are_frames(lines, numbers, others, found)) else found


def are_frames(
    lines: torch.Tensor, numbers: bool, others: Sequence[torch.Tensor], references: tuple[int, int]
) -> torch.Tensor:
    """Whether pictures, but for these references, are frames, and these are references; bool [].

    lines    [pictures, columns] of the columns that tell pictures apart
    numbers  the one column holds numbers
    others   lines of rows [height, m] and of columns [width, n] of a picture
    """
    lines, others = lines.double(), [x.double() for x in others if len(x) > 1]
    before, after = references
    frames = lines[before : len(lines) - after]
    if len(frames) < 2:
        return torch.ones((), dtype=torch.bool, device=lines.device)
    good = (frames[1:] != frames[:-1]).any(1).all()
    if numbers and others:
        longest = [_moves(x).amax() for x in others]
        good = good & (_moves(frames).amax() <= torch.stack(longest).amax())
    if len(frames) == 2:
        return good
    if len(frames) == 3 and not numbers:
        good = good & _like_rows(frames, others)
        steps = _steps(frames, numbers)
    else:
        steps = _steps(frames, numbers)
        even = _even(frames, steps)
        first = _first_is_short(frames, numbers) if not before and len(frames) > 3 + (not numbers) else even
        good = good & (even | first)
    pictures = torch.cat([lines[:before], lines[len(lines) - after :]])
    if len(pictures):
        for near, next_to_it in ((frames[0], frames[1]), (frames[-1], frames[-2])):
            away = (pictures - (steps.turn * near - next_to_it)).abs() > steps.allowed
            good = good & (away & steps.tells).any(1).all()
    return good


def _moves(lines: torch.Tensor) -> torch.Tensor:
    return (lines[1:] - lines[:-1]).abs()


def _steps(lines: torch.Tensor, numbers: bool) -> _Steps:
    moves = _moves(lines)
    if numbers:
        step = moves.mean(0)
        return _Steps(torch.full_like(step, 2), step / 4, step > 0)
    step, size = moves.amax(0), lines.abs().amax(0)
    both, middle = lines[2:] + lines[:-2], lines[1:-1]
    turn = (both * middle).sum(0) / middle.square().sum(0).clamp_min(1e-30)
    rounded = ((lines == lines.bfloat16()) | (lines == lines.half())).all()
    tells = step > torch.where(rounded, 4 * EVEN, 0.001) * size
    mean = (lines[-1] - lines[0]) / (len(lines) - 1)
    straight = ((lines[1:] - lines[:-1] - mean).abs() < mean.abs() / 4).all(0) & (len(lines) > 3)
    turn, allowed = torch.where(straight, 2, turn), torch.minimum(EVEN * size, step / 4)
    return _Steps(turn, torch.where(straight, step / 2, allowed), tells | straight)


def _even(lines: torch.Tensor, steps: _Steps) -> torch.Tensor:
    off = (lines[2:] + lines[:-2] - steps.turn * lines[1:-1]).abs().amax(0)
    return ((off <= steps.allowed) | ~steps.tells).all() & steps.tells.any()


def _is_even(lines: torch.Tensor, numbers: bool) -> bool:
    lines = lines.double()
    return bool(_even(lines, _steps(lines, numbers)))


def _first_is_short(lines: torch.Tensor, numbers: bool) -> torch.Tensor:
    """Whether all but the first go on by equal steps, and the first is less than a step in front of them.

    A slow column tells that by itself. Of the others some turn too fast for it; a third must agree on one place. Where
    a picture has two times, its beginning and its end, the first may end a whole step before the second.
    """
    rest = lines[1:]
    steps, move = _steps(rest, numbers), _moves(rest).amax(0)
    step = torch.maximum((steps.turn * rest[0] - rest[1] - rest[0]).abs(), (rest[1] - rest[0]).abs())
    rises, falls = (lines[1:] > lines[:-1]).all(0), (lines[1:] < lines[:-1]).all(0)
    slow = (rises | falls) & steps.tells
    near = slow.any() & (((lines[0] - rest[0]).abs() <= step + steps.allowed / 8) | ~slow).all()
    part = torch.linspace(0, 1, 33, dtype=lines.dtype, device=lines.device)[:, None]  # of a step
    angle = (steps.turn / 2).clamp(-1, 1).acos()
    bent = (rest[0] * (angle * (1 + part)).sin() - rest[1] * (angle * part).sin()) / angle.sin()
    place = torch.where(angle.sin() > 1e-4, bent, rest[0] * (1 + part) - rest[1] * part)  # [parts, columns]
    there = ((lines[0] - place).abs() <= steps.allowed + move / 32) & steps.tells
    return _even(rest, steps) & near & (3 * there.sum(1) >= steps.tells.sum()).any()


def _like_rows(frames: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether three frames have the values of three rows, or columns, in succession: their steps alone tell nothing."""
    found = [x.unfold(0, 3, 1).movedim(2, 0).flatten(1) for x in others if len(x) > 2]
    if not found:
        return torch.zeros((), dtype=torch.bool, device=frames.device)
    three = torch.cat(found, 1)  # [3, places x columns]
    alike = ((frames[:, :, None] - three[:, None]).abs() <= EVEN * frames.abs().amax()).all(0)  # [columns, ...]
    tells = _moves(frames).amax(0) > 4 * EVEN * frames.abs().amax()
    return (alike.any(1) & tells).any()
