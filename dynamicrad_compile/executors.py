"""Jobs done in this process, in a pool of processes, or by an executor of the user's own, on any machines.

An executor is what has `submit(function, *arguments)` and gives a future as concurrent.futures has them: Executor of
concurrent.futures itself, Client or `get_executor()` of dask.distributed, MPIPoolExecutor of mpi4py. A worker that dies
loses nothing but what it was at, which is done again.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import signal
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .errors import DynamicRadError, OptionsError

log = logging.getLogger(__name__)

TRIES = 3
"""How often a job is given to a worker that does not come back, before the run ends."""

J = TypeVar("J")
R = TypeVar("R")


def check_executor(executor: Any) -> None:
    """Raises OptionsError for a value that is neither None nor has `submit`."""
    if executor is None or (callable(getattr(executor, "submit", None)) and not isinstance(executor, type)):
        return
    raise OptionsError(
        "executor must be an object with submit(function, *arguments) that gives a future, such as "
        f"concurrent.futures.ProcessPoolExecutor(4) or a dask.distributed.Client, got {executor!r}."
    )


@dataclass(frozen=True)
class Failed:
    """What came of a job instead of its result."""

    error: Exception

    @property
    def why(self) -> str:
        """The error in a line."""
        return f"{type(self.error).__name__}: {self.error}"


@dataclass(frozen=True)
class Lost(Failed):
    """No worker came back with it; the error is the executor's."""


@dataclass(frozen=True)
class Raised(Failed):
    """What a job itself raised, as a value: whatever a future raises is then the executor's trouble, not the job's."""

    trace: str


class _OnWorker(Exception):
    """The traceback of the worker, as the cause of what is raised here."""


def attempt(function: Callable[[J], R], job: J, token: str) -> R | Raised:
    """Runs on the worker. The token makes each try a new one: Dask answers an equal call with its earlier outcome."""
    try:
        return function(job)
    except Exception as error:
        return Raised(error, traceback.format_exc())


def _start_process() -> None:
    # Ctrl-C is the parent's business; it gets it too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class Workers:
    """Who does the jobs: `executor` if there is one, else `processes` spawned ones, or this one if that is 1.

    goes_on  how a run that ended with an error is gone on with, for the message: "resume=True (--resume)"
    say      is told in a few words when a job is given out again
    Raises OptionsError for an executor that is none.
    """

    def __init__(
        self, executor: Any = None, processes: int = 1, *, goes_on: str, say: Callable[[str], None] = lambda text: None
    ) -> None:
        check_executor(executor)
        self._given = executor
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._goes_on = goes_on
        self._say = say

    def run(self, function: Callable[[J], R], jobs: Sequence[J], name: Callable[[J], str]) -> Iterator[tuple[int, R]]:
        """(place, result) of all jobs, in the order in which they are done.

        What the function raises is raised here as it is. A job whose worker died is given out again, TRIES times in
        all; then DynamicRadError says which, by its `name`. With other workers than this process either is raised when
        the other jobs are done, whose results would be lost. Who stops asking cancels what is left.
        """
        if self._given is None and self._processes == 1:
            for place, job in enumerate(jobs):
                yield place, function(job)
            return
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        pending: dict[int, Future[R | Raised]] = {}
        lost: Counter[int] = Counter()
        failures: list[Exception] = []

        def give_out(place: int) -> None:
            pending[place] = future = self._submit(attempt, function, jobs[place], uuid.uuid4().hex)
            future.add_done_callback(lambda _: done.put(place))

        try:
            for place in range(len(jobs)):
                give_out(place)
            while pending:
                place = done.get()
                found = _outcome(pending.pop(place))
                if not isinstance(found, Failed):
                    yield place, found
                    continue
                which = name(jobs[place])
                lost[place] += isinstance(found, Lost)
                if isinstance(found, Lost) and lost[place] < TRIES:
                    log.warning("%s: its worker was lost, try %d of %d: %s", which, lost[place], TRIES, found.why)
                    self._say(f"{which}: again, its worker was lost")
                    give_out(place)
                    continue
                failures.append(self._failure(which, found))
                log.error("%s failed, %d others are waited for: %s", which, len(pending), found.why)
                self._say(f"{which}: failed")
        finally:
            for future in pending.values():
                future.cancel()
        if failures:
            raise failures[0]

    def _submit(self, *call: Any) -> Future[Any]:
        """A future of the call; one that has failed where the executor takes no calls."""
        try:
            return (self._own_pool() if self._given is None else self._given).submit(*call)
        except Exception as trouble:
            if self._pool is not None and isinstance(trouble, BrokenExecutor):
                self._pool = None  # a pool of which a process died takes nothing any more
                return self._submit(*call)
            future: Future[Any] = Future()
            future.set_exception(trouble)
            return future

    def _own_pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, mp_context=context, initializer=_start_process)
        return self._pool

    def _failure(self, which: str, found: Failed) -> Exception:
        """The error to raise, with its cause."""
        if isinstance(found, Raised):
            found.error.__cause__ = _OnWorker(f"\n{found.trace}")
            return found.error
        error = DynamicRadError(
            f"{which}: no worker came back with it in {TRIES} tries. The last time: {found.why}. What has been done is "
            f"kept: once the workers are well, go on by {self._goes_on}."
        )
        error.__cause__ = found.error
        return error

    def close(self) -> None:
        """Let go of our own processes; what they are at is dropped. An executor that was given is its owner's."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[R | Raised]) -> R | Failed:
    try:
        return future.result()
    except Exception as trouble:
        return Lost(trouble)
