"""Which generation is running: a thread's own, or the one that the caller has entered.

What a compiled model remembers from call to call (its step clock, the regimes of its prompts, the blocks that it keeps)
belongs to a model and a generation, never to a graph. See `state` for what is kept.
"""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .state import Pool, State


class Generation:
    """One request: what runs inside `with` shares no step, regime or blocks with any other request.

        with drad.generation():
            video = pipe(prompt).frames

    Where one thread works on several requests in turn, each has its own and enters it around each of its steps:

        requests = [drad.generation() for _ in prompts]
        for timestep in timesteps:
            for request, latents in zip(requests, batch):
                with request:
                    model(latents, timestep, ...)

    Without one, every thread is a generation of its own, which begins anew where timesteps jump back. Entering is
    cheap, nests, and holds for the present thread or asyncio task. What it kept is free when the object is gone.
    """

    def __init__(self) -> None:
        self._states: weakref.WeakKeyDictionary[Pool, State] = weakref.WeakKeyDictionary()

    def __enter__(self) -> Generation:
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _entered.set(_entered.get()[:-1])

    def __del__(self) -> None:
        for pool, state in self._states.items():
            pool.give(state)

    def state_in(self, pool: Pool) -> State:
        """What this generation keeps in a pool, taken from it at the first call."""
        state = self._states.get(pool)
        if state is None:
            state = self._states[pool] = pool.take()
        return state


generation = Generation

_entered: ContextVar[tuple[Generation, ...]] = ContextVar("dynamicrad_generations", default=())
_threads = threading.local()


def current() -> Generation:
    """The generation that was entered last, else that of this thread."""
    entered = _entered.get()
    if entered:
        return entered[-1]
    if not hasattr(_threads, "generation"):
        _threads.generation = Generation()
    return _threads.generation
