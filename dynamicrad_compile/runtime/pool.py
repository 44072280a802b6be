"""Tensors that a model keeps from call to call, for one generation each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .clock import JUMPS, MIXED

log = logging.getLogger(__name__)

MIXED_CALLS = (
    "timesteps jump back and forth: calls of several requests are mixed, and their steps and regimes with them. "
    "Put each request into `with dynamicrad_compile.generation():`"
)


@dataclass(frozen=True)
class Slot:
    """A tensor that a graph is handed at each call.

    name  of the graph's input
    make  its value where nothing is remembered yet
    of    "generation": begins anew with each; "model": a sum over all of them; "call": the clock or the regimes that
          drad.compile keeps beside the graphs, by name
    """

    name: str
    make: Callable[[], Tensor]
    of: Literal["generation", "model", "call"] = "generation"


class ClockWatch:
    """Looks at a clock after each call without waiting for the device; on a GPU it sees an earlier call's."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def jumps(self, clock: Tensor) -> int:
        """Jumps that the clock has counted (see `clock.new_clock`)."""
        if clock.device.type == "cpu":
            return int(clock[JUMPS])
        if clock.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return 0
        if self._seen is None:
            self._seen = torch.zeros((), dtype=torch.float32, pin_memory=True, device="cpu")
        seen = int(self._seen)
        self._seen.copy_(clock[JUMPS], non_blocking=True)
        return seen


@dataclass
class State:
    """The tensors of one generation in a pool, in the order of its slots; stream: the CUDA stream that uses them."""

    tensors: list[Tensor]
    stream: int
    watch: ClockWatch = field(default_factory=ClockWatch)


class Pool:
    """The states of one model in one graph.

    A state that a generation has left serves a later one: its tensors stay where they are, so CUDA graphs replay.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self.states: list[State] = []
        self.mixed = False
        self._free: list[State] = []
        self._clock = next((i for i, slot in enumerate(slots) if slot.name == "clock"), None)

    def take(self) -> State:
        """A state as at the beginning of a generation."""
        with torch.inference_mode(False), torch.no_grad():
            free = self._left_on(_stream())
            if free is None:
                free = State([slot.make() for slot in self.slots], _stream())
                self.states.append(free)
                return free
            for slot, tensor in zip(self.slots, free.tensors, strict=True):
                if slot.of == "generation":
                    tensor.copy_(slot.make())
            return free

    def give(self, state: State) -> None:
        """Take back the state of a generation that is over."""
        self._free.append(state)

    def total(self, place: int) -> Tensor | None:
        """Sum of one slot's tensors over all states; None before the first call."""
        found = [state.tensors[place] for state in list(self.states)]
        return torch.stack(found).sum(0) if found else None

    def watch(self, state: State) -> None:
        """After a call: say once, in the log, that calls of several generations are mixed."""
        if self._clock is None or self.mixed:
            return
        if state.watch.jumps(state.tensors[self._clock]) >= MIXED:
            self.mixed = True
            log.warning(MIXED_CALLS)

    def _left_on(self, stream: int) -> State | None:
        """A free state whose last work went to this CUDA stream: on another it might still be running."""
        for state in list(self._free):
            if state.stream == stream:
                try:
                    self._free.remove(state)
                except ValueError:  # another thread was faster
                    continue
                return state
        return None


def _stream() -> int:
    """The present CUDA stream as a number; 0 without CUDA."""
    return int(torch.cuda.current_stream().cuda_stream) if torch.cuda.is_initialized() else 0
