"""Which stage of a run (`plans.stages`) the present step belongs to, on the device: a new stage compiles nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .clock import BEFORE, FRESH, LAST, STEP


def stage_of(clock: Tensor, number: int, starts: tuple[float, ...], by: str, falling: bool) -> Tensor:
    """int64 [1]: the stage of the clock's step; arguments as of `plans.stages.Stages`."""
    if not starts:
        return torch.remainder(clock[STEP], number).to(torch.int64).reshape(1)
    return _begun(clock[LAST] if by == "timestep" else clock[STEP], starts, falling)


def begins(clock: Tensor, starts: tuple[float, ...], by: str, falling: bool) -> Tensor:
    """bool [1]: whether this call is the first one in its stage."""
    now, before = (clock[LAST], clock[BEFORE]) if by == "timestep" else (clock[STEP], clock[STEP] - 1)
    return (_begun(now, starts, falling) != _begun(before, starts, falling)) & (clock[FRESH] > 0)


def is_stage(stage: Tensor, stages: tuple[int, ...]) -> Tensor:
    """bool []: whether a stage, int64 [1], is one of these."""
    found = torch.zeros_like(stage, dtype=torch.bool)
    for number in stages:
        found = found | (stage == number)
    return found.reshape(())


def row_of(regimes: Tensor, stage: Tensor, stages: int) -> Tensor:
    """int64 [B]: the plans of these regimes, int64 [B], at a stage."""
    return regimes * stages + stage


def _begun(position: Tensor, starts: tuple[float, ...], falling: bool) -> Tensor:
    """int64 [1]: how many of the stages that begin at `starts` have begun at a step or timestep, []."""
    count = torch.zeros_like(position, dtype=torch.int64)
    for start in starts:
        count = count + (position <= start if falling else position >= start)
    return count.reshape(1)
