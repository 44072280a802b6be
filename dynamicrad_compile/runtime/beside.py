"""What drad.compile keeps beside the graphs of a model, so that clock and regimes cross graph breaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .clock import FRESH, KNOWN_WAY, LAST, STEP, WAY, advance, new_clock
from .generation import current
from .pool import Pool, Slot
from .regimes import MAX_BATCH, latch, new_regimes


@dataclass
class CallState:
    """Clock and regimes of a call; None until a call has shown a timestep, and a prompt that the router is for."""

    clock: Tensor | None = None
    regimes: Tensor | None = None


class PinnedState(CallState):
    """Regimes and timestep that the caller sets before each call, as training does, where calls are no generation.

    Dense steps follow from the timestep alone (option dense_timestep); which steps the first n are is not known here.
    """

    clock: Tensor
    regimes: Tensor

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(new_clock(device), new_regimes(device))

    def pin(self, regimes: Tensor, timestep: Tensor, rising: bool = False) -> None:
        """Regimes int64 [B] of the rows of the next call, and its timestep of any shape, of which the largest counts.

        rising: the model's timesteps grow while it denoises. The compiled graph reads what is written here.
        """
        if regimes.dim() != 1 or not 0 < len(regimes) <= MAX_BATCH:
            raise ValueError(f"regimes must be [B] with B in 1..{MAX_BATCH}, got {list(regimes.shape)}")
        self.regimes[: len(regimes)] = regimes
        self.regimes[len(regimes) :] = regimes.amax()
        self.clock.zero_()
        for place in (WAY, KNOWN_WAY):
            self.clock[place] = 1.0 if rising else -1.0
        for place in (STEP, FRESH):
            self.clock[place] = 1.0
        self.clock[LAST] = timestep.detach().to(torch.float32).amax()


class CallNotes:
    """Notes timestep and prompt of each call of one model, for the generation that is running."""

    def __init__(self, router: Any = None) -> None:
        self.router = router
        self._pools: dict[torch.device, Pool] = {}
        self._routed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CallNotes:
        return CallNotes(self.router)

    def __reduce__(self) -> tuple[type[CallNotes], tuple[Any]]:
        return CallNotes, (self.router,)

    @property
    def mixed(self) -> bool:
        """Whether calls of several generations were seen as one."""
        return any(pool.mixed for pool in self._pools.values())

    def note(self, timestep: Tensor | None, prompt: Tensor | None, mask: Tensor | None) -> CallState:
        """Advance the clock by a call's timestep, and route its prompt [B, L, C] with mask [B, L] or None.

        Rows beyond the prompt's batch get the safest of its regimes; more than MAX_BATCH prompts are not routed here.
        """
        device = next((t.device for t in (prompt, timestep) if t is not None), None)
        if timestep is None or device is None:
            return CallState()
        pool = self._pools.setdefault(device, _pool(device))
        state = current().state_in(pool)
        clock, regimes = state.tensors
        with torch.no_grad():
            now = advance(timestep, clock)
            pool.watch(state)
            if self.router is not None and prompt is not None and prompt.shape[-1] == self.router.embedding_dim:
                if prompt.shape[0] > MAX_BATCH:
                    return CallState(clock)
                chosen = latch(self.router.predict(prompt, mask if self.router.masked else None), now, regimes)
                regimes[len(chosen) :] = chosen.amax()
                self._routed = True
        return CallState(clock, regimes if self._routed else None)


def _pool(device: torch.device) -> Pool:
    return Pool((Slot("clock", lambda: new_clock(device)), Slot("regimes", lambda: new_regimes(device))))


_running: ContextVar[CallState | None] = ContextVar("dynamicrad_call", default=None)


def running() -> CallState | None:
    """State of the call of drad.compile's model that is running; None outside of one."""
    return _running.get()


@contextmanager
def run_with(state: CallState) -> Iterator[None]:
    """While it is open, graphs are handed the clock and the regimes of `state`."""
    token = _running.set(state)
    try:
        yield
    finally:
        _running.reset(token)
