"""Which pictures in a row are the frames of one video, by their times.

Frames follow each other by equal steps. The first may last shorter, and so may the first of every few, where a video
is encoded in chunks of frames: 1, 4, 4, 4, 4, 1, 4, 4, 4, 4. A picture that is somewhere else in time is a reference.
"""

from __future__ import annotations

import torch

MOST = 8
"""A first frame that lasts shorter lasts at least a so manieth part of the others."""
MIN_NUMBERED = 5
"""Pictures to be edited may have the numbers 0, 1, 2, 3, as so few frames have."""
OFF = 0.02
"""Steps may be off by this share of the longest: times may be rounded."""


def go_on(times: torch.Tensor) -> torch.Tensor:
    """bool []: whether times [F], of numbers in any unit, are those of the frames of one video."""
    if len(times) < 2:
        return torch.ones((), dtype=torch.bool, device=times.device)
    steps = times[1:] - times[:-1]
    steps = steps * steps[:1].sign()
    short, long = steps.amin(), steps.amax()
    place = torch.arange(len(steps), device=times.device)
    shorter = steps < (short + long) / 2
    period = torch.where(shorter & (place > 0), place, len(steps)).amin()
    close = torch.minimum(steps - short, long - steps) <= OFF * long
    in_chunks = close.all() & (long <= (1 + OFF) * MOST * short) & (shorter == (place % period == 0)).all()
    return (short > 0) & ((long - short <= OFF * long) | in_chunks)


def may_be_names(times: torch.Tensor, numbers: bool, longest: torch.Tensor) -> torch.Tensor:
    """bool []: whether times [F] that `go_on` may be names of pictures, which follow each other as frames do.

    Of `numbers`: whole ones, few of them or further apart than rows and columns, which are `longest` apart; or three at
    uneven steps. Of angles: few of them, unless the first of four lasts shorter.
    """
    steps = (times[1:] - times[:-1]).abs()
    few = len(times) < MIN_NUMBERED
    even = steps.amax() - steps.amin() <= OFF * steps.amax()
    if numbers:
        names = (times == times.round()).all() & (few | (steps.amax() > longest))
        return names | ~even if len(times) < 4 else names
    return even | (len(times) < 4) if few else torch.zeros_like(even)


def are_one_more(times: torch.Tensor, start: int, stop: int) -> bool:
    """Whether a time beside the frames start..stop is one step before the first or behind the last: then it is no frame
    and no reference, and the times are names of pictures."""
    first, last = times[start], times[stop - 1]
    before, behind = times[start + 1] - first, last - times[stop - 2]
    others = torch.cat([times[:start], times[stop:]])
    ends = torch.stack([(others - (first - before)) / before, (others - (last + behind)) / behind])
    return bool((ends.abs() <= OFF).any())


def longest_run(times: torch.Tensor) -> tuple[int, int]:
    """(start, stop) of the longest stretch of times [K] that `go_on`; of equally long ones the last.

    Empty where another stretch, of MIN_NUMBERED at least and more than half as long, overlaps with it: then it is not
    certain where a video begins and ends.
    """
    runs = [(0, 0)]
    for start in range(len(times)):
        low, high = start + 1, len(times)
        while low < high:  # whatever begins a video is one
            middle = (low + high + 1) // 2
            low, high = (middle, high) if bool(go_on(times[start:middle])) else (low, middle - 1)
        if low > runs[-1][1]:
            runs.append((start, low))
    best = max(runs, key=lambda run: (run[1] - run[0], run))
    least = max(MIN_NUMBERED, (best[1] - best[0]) // 2 + 1)
    others = [run for run in runs if run != best and run[1] - run[0] >= least]
    return (0, 0) if any(max(a, best[0]) < min(b, best[1]) for a, b in others) else best


def angles(column: torch.Tensor) -> torch.Tensor:
    """fp64 [...]: angles of sines, or up to their sign and a constant those of cosines, within half a turn."""
    return column.double().clamp(-1, 1).asin()


def times_of_angles(lines: torch.Tensor) -> int | None:
    """Which column of sines and cosines [K, columns] tells the times of K pictures best; None if none does.

    The slowest of those whose steps are not lost in rounding: the faster ones may have turned round.
    """
    values = lines.double()
    if not lines.is_floating_point() or bool((values.abs() > 1.001).any()) or len(lines) < 2:
        return None
    eps = torch.finfo(lines.dtype).eps
    rounding = eps / (1 - values.square()).clamp_min(eps).sqrt()
    steps = angles(lines).diff(dim=0).abs()
    step = steps.median(0).values
    exact = step * OFF > 2 * rounding.amax(0)
    usable = exact.nonzero().flatten()
    return int(usable[step[usable].argmin()]) if len(usable) else None
