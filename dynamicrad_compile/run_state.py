"""State of a running generation, on the device: which denoising step it is, which regime it is in, what was skipped.

Plain PyTorch on small buffers, so a compiled graph holds it, CUDA graphs replay it, and neither a new step nor a new
prompt compiles anything or waits for the device.

The step clock needs nothing but the timestep. A timestep that differs from the last one is a new step; one that goes
against the direction of this generation is the first step of a new generation. So it does not matter whether a model
counts 1000 .. 0, 1 .. 0, logarithms of sigma or 0 .. 1000, and the two calls of classifier-free guidance are one step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

LAST, WAY, STEP, KNOWN_WAY, FRESH = range(5)
MAX_BATCH = 64
"""Rows of a batch whose regimes can be remembered."""


def new_clock(device: torch.device | str = "cpu") -> Tensor:
    """Buffer of the step clock, fp32 [5].

    Last timestep (NaN before the first), direction in this generation (-1 falling, 0 not known yet, 1 rising), step
    from 0, direction of the last generation that had three steps, 1 where the last call was the first of its step.
    """
    return torch.tensor([float("nan"), 0.0, 0.0, 0.0, 0.0], device=device)


def new_regimes(device: torch.device | str = "cpu") -> Tensor:
    """Buffer of the latched regimes, int64 [MAX_BATCH]."""
    return torch.zeros(MAX_BATCH, dtype=torch.int64, device=device)


class RunState:
    """Clock and regimes that drad.compile keeps beside its graphs, so that they cross graph breaks.

    clock and regimes are None until a call has shown a timestep, and a prompt that the router is for.
    """

    def __init__(self, router: Any = None) -> None:
        self.router = router
        self.clock: Tensor | None = None
        self.regimes: Tensor | None = None

    def note_call(self, timestep: Tensor | None, prompt: Tensor | None, mask: Tensor | None) -> None:
        """Advance the clock by a call's timestep, and route its prompt [B, L, C] with mask [B, L] or None.

        Rows beyond the prompt's batch get the safest of its regimes; more than MAX_BATCH prompts are not routed here.
        """
        if timestep is None:
            return
        with torch.no_grad():
            device = timestep.device if prompt is None else prompt.device
            if self.clock is None or self.clock.device != device:
                self.clock, self.regimes = new_clock(device), None
            clock = advance(timestep, self.clock)
            if self.router is None or prompt is None or prompt.shape[-1] != self.router.embedding_dim:
                return
            if prompt.shape[0] > MAX_BATCH:
                self.regimes = None
                return
            if self.regimes is None:
                self.regimes = new_regimes(device)
            routed = self.router.predict(prompt, mask if self.router.masked else None)
            regimes = latch(routed, clock, self.regimes)
            self.regimes[len(regimes) :] = regimes.amax()


class PinnedState(RunState):
    """Regimes and timestep that the caller sets before each call, as training does, where calls are no generation.

    Dense steps follow from the timestep alone (option dense_timestep); which steps the first n are is not known here.
    """

    clock: Tensor
    regimes: Tensor

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.clock, self.regimes = new_clock(device), new_regimes(device)

    def pin(self, regimes: Tensor, timestep: Tensor, rising: bool = False) -> None:
        """Regimes int64 [B] of the rows of the next call, and its timestep of any shape, of which the largest counts.

        rising: the model's timesteps grow while it denoises. The compiled graph reads what is written here.
        """
        if regimes.dim() != 1 or not 0 < len(regimes) <= MAX_BATCH:
            raise ValueError(f"regimes must be [B] with B in 1..{MAX_BATCH}, got {list(regimes.shape)}")
        way = 1.0 if rising else -1.0
        self.regimes[: len(regimes)] = regimes
        self.regimes[len(regimes) :] = regimes.amax()
        self.clock.copy_(torch.tensor([0.0, way, 1.0, way, 1.0]))
        self.clock[LAST] = timestep.detach().to(torch.float32).amax()

    def note_call(self, timestep: Tensor | None, prompt: Tensor | None, mask: Tensor | None) -> None:
        """Nothing: what is pinned stays."""


@has_side_effect
def advance(timestep: Tensor, clock: Tensor) -> Tensor:
    """Note a call's timestep in the clock; returns the clock's new values, fp32 [5].

    timestep has any shape; where frames or tokens have their own, the largest counts (clean tokens have 0).
    """
    now = timestep.detach().to(clock.device, torch.float32).amax()
    first = clock[LAST].isnan()
    moved = ~first & (now != clock[LAST])
    way = torch.sign(now - clock[LAST])
    turned = moved & (clock[WAY] != 0) & (way != clock[WAY])
    onward = moved & ~turned
    new = torch.stack(
        [
            now,
            torch.where(onward, way, torch.where(turned, 0.0, clock[WAY])),
            torch.where(onward, clock[STEP] + 1, torch.where(turned, 0.0, clock[STEP])),
            torch.where(onward & (clock[STEP] > 0), way, clock[KNOWN_WAY]),
            (first | moved).to(torch.float32),
        ]
    )
    clock.copy_(new)
    return new


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


def is_refresh(clock: Tensor, dense_steps: int, refresh_steps: int) -> Tensor:
    """bool [1]: whether blocks are chosen anew: at the first call of every refresh_steps-th step after dense ones."""
    since = clock[STEP] - dense_steps
    return ((clock[FRESH] > 0) & (since >= 0) & (torch.remainder(since, refresh_steps) == 0)).reshape(1)


@has_side_effect
def latch(routed: Tensor, clock: Tensor, latched: Tensor) -> Tensor:
    """The regimes of this call, int64 [B]: those routed at the first call of the generation, which are remembered.

    So the negative prompt of classifier-free guidance, which comes second, is given the regime of the prompt.
    """
    begins = (clock[STEP] == 0) & (clock[FRESH] > 0)
    kept = latched[: routed.shape[0]]
    regimes = torch.where(begins, routed, kept)
    kept.copy_(regimes)
    return regimes


@has_side_effect
def record(
    stats: Tensor, kv_counts: Tensor, compensate: Tensor | None, kv_indices: Tensor, num_kv: int | None, block_kv: int
) -> None:
    """Add a call to `stats`, fp64 [2]: share of dense attention that was computed, number of calls.

    num_kv None: the width of the indices is the number of kv blocks.
    """
    blocks = kv_indices.shape[-1] if num_kv is None else num_kv
    share = kv_counts.to(torch.float64).mean() / blocks
    if compensate is not None:
        thinned = (kv_counts < blocks) & (compensate > 0)[:, None, None]
        share = share + thinned.to(torch.float64).mean() / block_kv
    stats.add_(torch.stack([share, torch.ones_like(share)]))
