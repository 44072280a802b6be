"""State of a running generation, on the device: its clock, and the regimes that its prompts were given.

A new prompt compiles nothing and waits for nothing, as a new step does (see `clock`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from .clock import FRESH, LAST, STEP, advance, new_clock

MAX_BATCH = 64
"""Rows of a batch whose regimes can be remembered."""


def new_regimes(device: torch.device | str = "cpu") -> Tensor:
    """Buffer of the latched regimes, int64 [MAX_BATCH]."""
    return torch.zeros(MAX_BATCH, dtype=torch.int64, device=device)


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
