"""The step clock: which denoising step a generation is at, on the device.

Plain PyTorch on a small buffer, so a compiled graph holds it, CUDA graphs replay it, and a new step neither compiles
anything nor waits for the device. Whose clock it is: see `state`.

The clock needs nothing but the timestep. A timestep that differs from the last one is a new step; one that goes
against the direction of this generation is the first step of a new generation. So it does not matter whether a model
counts 1000 .. 0, 1 .. 0, logarithms of sigma or 0 .. 1000, and the two calls of classifier-free guidance are one step.
Two generations whose calls are mixed on one clock can't be told apart, but it shows: generations seem to end after a
step or two, and each to begin at another timestep.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

LAST, WAY, STEP, KNOWN_WAY, FRESH, FIRST, JUMPS, CALLS, BEFORE = range(9)
MIXED = 2
"""From so many jumps on, the calls of a clock are taken for those of several generations."""
CALLS_OF_A_STEP = 4
"""Guidance makes at most so many calls of a step; more may be several generations in lockstep."""


def new_clock(device: torch.device | str = "cpu") -> Tensor:
    """Buffer of the step clock, fp32 [9].

    LAST       timestep of the last call, NaN before the first
    WAY        direction in this generation: -1 falling, 0 not known yet, 1 rising
    STEP       step from 0
    KNOWN_WAY  direction of the last generation that had three steps
    FRESH      1 where the last call was the first of its step
    FIRST      first timestep of this generation
    JUMPS      generations on end that had less than three steps and were followed by one that began elsewhere
    CALLS      calls of this step
    BEFORE     timestep of the step before this one; at the first step its own
    """
    clock = torch.zeros(BEFORE + 1, dtype=torch.float32, device=device)
    clock[LAST].fill_(float("nan"))  # on the device: a copy of host numbers would wait for it
    return clock


@has_side_effect
def advance(timestep: Tensor, clock: Tensor) -> Tensor:
    """Note a call's timestep in the clock; returns the clock's new values, fp32 [9].

    timestep has any shape; where frames or tokens have their own, the largest counts (clean tokens have 0).
    """
    now = timestep.detach().to(clock.device, torch.float32).amax()
    first = clock[LAST].isnan()
    moved = ~first & (now != clock[LAST])
    way = torch.sign(now - clock[LAST])
    turned = moved & (clock[WAY] != 0) & (way != clock[WAY])
    onward = moved & ~turned
    jumped = turned & (clock[STEP] < 2) & (now != clock[FIRST])
    long = torch.where(onward, clock[STEP] > 0, turned & ~jumped)
    new = torch.stack(
        [
            now,
            torch.where(onward, way, torch.where(turned, 0.0, clock[WAY])),
            torch.where(onward, clock[STEP] + 1, torch.where(turned, 0.0, clock[STEP])),
            torch.where(onward & (clock[STEP] > 0), way, clock[KNOWN_WAY]),
            (first | moved).to(torch.float32),
            torch.where(first | turned, now, clock[FIRST]),
            torch.where(jumped, clock[JUMPS] + 1, torch.where(long, 0.0, clock[JUMPS])),
            torch.where(first | moved, 1.0, clock[CALLS] + 1),
            torch.where(first | turned, now, torch.where(moved, clock[LAST], clock[BEFORE])),
        ]
    )
    clock.copy_(new)
    return new


def may_be_mixed(clock: Tensor) -> Tensor:
    """bool []: whether calls of several generations may be mixed on this clock."""
    return (clock[JUMPS] > 0) | (clock[CALLS] > CALLS_OF_A_STEP)


def stays_dense(clock: Tensor, dense_steps: int, dense_timestep: float | None) -> Tensor:
    """bool []: whether the present step is one of those that stay dense.

    dense_steps first steps do, and all whose timestep is on the noisy side of dense_timestep (in the model's own
    units). Until three steps have shown in which direction timesteps go, all stay dense where a timestep is given.
    """
    dense = clock[STEP] < dense_steps
    if dense_timestep is not None:
        way = clock[KNOWN_WAY]
        noisy = torch.where(way < 0, clock[LAST] >= dense_timestep, clock[LAST] <= dense_timestep)
        dense = dense | (way == 0) | noisy
    return dense


def is_first_call_of(clock: Tensor, steps: tuple[int, ...]) -> Tensor:
    """bool [1]: whether this is the first call of one of these steps."""
    found = torch.zeros_like(clock[STEP], dtype=torch.bool)
    for step in steps:
        found = found | (clock[STEP] == step)
    return (found & (clock[FRESH] > 0)).reshape(1)


def is_refresh(clock: Tensor, dense_steps: int, refresh_steps: int) -> Tensor:
    """bool [1]: whether blocks are chosen anew: at the first call of every refresh_steps-th step after dense ones."""
    since = clock[STEP] - dense_steps
    return ((clock[FRESH] > 0) & (since >= 0) & (torch.remainder(since, refresh_steps) == 0)).reshape(1)
