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
class Raised:
    """What a job itself raised, as a value: whatever a future raises is then the executor's trouble, not the job's."""

    error: Exception
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

        What the function raises is raised here as it is, and what is not done yet is cancelled. A job whose worker
        died is given out again, TRIES times in all; then DynamicRadError says which, by its `name`.
        """
        if self._given is None and self._processes == 1:
            for place, job in enumerate(jobs):
                yield place, function(job)
            return
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        pending: dict[int, Future[R | Raised]] = {}
        lost: Counter[int] = Counter()

        def give_out(place: int) -> None:
            pending[place] = future = self._submit(attempt, function, jobs[place], uuid.uuid4().hex)
            future.add_done_callback(lambda _: done.put(place))

        try:
            for place in range(len(jobs)):
                give_out(place)
            while pending:
                place = done.get()
                try:
                    found = pending.pop(place).result()
                except Exception as trouble:
                    lost[place] += 1
                    self._tell(name(jobs[place]), lost[place], trouble)
                    give_out(place)
                    continue
                if isinstance(found, Raised):
                    raise found.error from _OnWorker(f"\n{found.trace}")
                yield place, found
        finally:
            for future in pending.values():
                future.cancel()

    def _submit(self, *call: Any) -> Future[Any]:
        """A future of the call; one that has failed where the executor takes no calls."""
        try:
            if self._given is not None:
                return self._given.submit(*call)
            return self._own_pool().submit(*call)
        except BrokenExecutor as trouble:
            if self._given is None:  # a pool of which a process died takes nothing any more
                self._pool = None
                return self._own_pool().submit(*call)
            return _failed(trouble)
        except Exception as trouble:
            return _failed(trouble)

    def _own_pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, mp_context=context, initializer=_start_process)
        return self._pool

    def _tell(self, job: str, times: int, trouble: Exception) -> None:
        """Raises DynamicRadError if the job was lost too often."""
        what = f"{type(trouble).__name__}: {trouble}"
        if times >= TRIES:
            raise DynamicRadError(
                f"{job}: no worker came back with it in {TRIES} tries. The last time: {what}. What has been done until "
                f"now is kept: once the workers are well, go on by {self._goes_on}."
            ) from trouble
        log.warning("%s: its worker was lost (%s); try %d of %d.", job, what, times + 1, TRIES)
        self._say(f"{job}: again, its worker was lost")

    def close(self) -> None:
        """Let go of our own processes; what they are at is dropped. An executor that was given is its owner's."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _failed(trouble: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(trouble)
    return future
