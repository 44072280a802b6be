"""What a graph remembers from call to call: tensors outside the graph, of one model and one generation each.

A graph names what it needs (`pool.Slot`) and is handed it as further inputs at each call. Nothing here waits for the
device.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch import Tensor

from .beside import CallState, running
from .generation import current
from .owner import Owner, alive, code_of, owner_of
from .pool import Pool, Slot, State


class GraphState:
    """The states of all models that call one graph, and which models these are.

    codes  file and first line of the functions that have called it
    """

    def __init__(self, slots: Sequence[Slot] = ()) -> None:
        self.slots = tuple(slots)
        self._own = tuple(slot for slot in slots if slot.of != "call")
        self.codes: set[tuple[str, int]] = set()
        self._pools: dict[Owner, Pool] = {}
        self._lock = threading.Lock()
        self._last_call: CallState | None = None

    def bind(self, compiled: Any) -> Any:
        """A function that calls the compiled graph with the state of whoever calls it."""

        def run(*inputs: Any) -> Any:
            frame = sys._getframe(1)
            owner = owner_of(frame)
            pool = self._pools.get(owner)
            if pool is None:
                pool = self._add(owner, frame)
            if not self.slots:
                return compiled(*inputs)
            state = current().state_in(pool)
            out = compiled(*inputs, *self._tensors(state))
            pool.watch(state)
            return out

        return run

    def owners(self) -> list[Owner]:
        """Who has called the graph, without those that are gone."""
        return [owner for owner in list(self._pools) if len(alive(owner)) == len(owner)]

    def pool_of(self, owner: Owner) -> Pool:
        """The states of one of the owners."""
        return self._pools[owner]

    def place_of(self, name: str) -> int:
        """Place of a slot among the tensors of a state."""
        return [slot.name for slot in self._own].index(name)

    def _add(self, owner: Owner, frame: FrameType) -> Pool:
        with self._lock:
            self.codes.add(code_of(frame))
            for known in self._pools.keys() - set(self.owners()):
                del self._pools[known]
            return self._pools.setdefault(owner, Pool(self._own))

    def _tensors(self, state: State) -> list[Tensor]:
        """What the graph is handed, in the order of its slots."""
        own = iter(state.tensors)
        call = running() or self._last_call  # a checkpoint computes again in the backward pass, when the call is over
        self._last_call = call
        return [_beside(call, slot) if slot.of == "call" else next(own) for slot in self.slots]


def _beside(call: CallState | None, slot: Slot) -> Tensor:
    kept = None if call is None else getattr(call, slot.name)
    return slot.make() if kept is None else kept
