"""Threads that run PyTorch operators side by side, each operator on one core.

A chain of short operators that are each split over all cores waits at a barrier after each of them. As soon as
another process takes one of the cores, every barrier waits for the scheduler: measured with two busy processes
on two cores, block-sparse attention became 90 times slower that way, and 2 times slower with these threads,
like dense attention. On an idle machine both are equally fast.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

MAX_WORKERS = 16
"""Above this the interpreter lock would be the bottleneck; operators then use several cores each."""

Task = Callable[["Buffers"], None]


class Buffers:
    """Scratch fp32 tensors by name that grow when they must, so that tasks reuse warm memory."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """An uninitialised contiguous tensor; a later `get` of the same name overwrites it."""
        numel = 1
        for size in shape:
            numel *= size
        held = self._held.get(name)
        if held is None or held.numel() < numel:
            held = self._held[name] = torch.empty(numel, dtype=torch.float32, device="cpu")
        return held[:numel].view(shape)


class _Pool:
    """Worker threads for one setting of `torch.get_num_threads()`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pid = os.getpid()
        self.workers = min(threads, MAX_WORKERS)
        each = threads // self.workers
        self.executor = ThreadPoolExecutor(
            self.workers, "dynamicrad", initializer=torch.set_num_threads, initargs=(each,)
        )
        ready = threading.Barrier(self.workers + 1)
        seen: deque[int] = deque()

        def start() -> None:
            seen.append(torch.get_num_threads())
            ready.wait()

        for _ in range(self.workers):
            self.executor.submit(start)
        ready.wait()
        # Each thread keeps its own number, but the last one set is also the start value of threads to come.
        torch.set_num_threads(threads)
        # A build of PyTorch without per-thread numbers: run everything in the caller.
        if self.executor.submit(torch.get_num_threads).result() != each or set(seen) != {each}:
            self.workers = 1


_pool: _Pool | None = None
_lock = threading.Lock()


def _current_pool() -> _Pool:
    """The pool for this process and its present thread number."""
    global _pool
    threads = torch.get_num_threads()
    with _lock:
        if _pool is None or _pool.threads != threads or _pool.pid != os.getpid():
            if _pool is not None and _pool.pid == os.getpid():
                _pool.executor.shutdown(wait=False)
            _pool = _Pool(threads)
        return _pool


def count() -> int:
    """Number of tasks that run at a time."""
    return min(torch.get_num_threads(), MAX_WORKERS)


def run(tasks: Sequence[Task], buffers: list[Buffers]) -> None:
    """Run all tasks; each worker passes its own of the `count()` buffers. Order and worker are not fixed."""
    if len(tasks) < 2 or count() == 1 or (pool := _current_pool()).workers == 1:
        with torch.inference_mode():
            for task in tasks:
                task(buffers[0])
        return
    queue = deque(tasks)

    def work(own: Buffers) -> None:
        # Inference mode, autocast and gradient mode belong to the caller's thread, not to this one.
        with torch.inference_mode():
            while queue:
                try:
                    task = queue.popleft()
                except IndexError:
                    return
                task(own)

    futures = [pool.executor.submit(work, own) for own in buffers[: min(pool.workers, len(tasks))]]
    try:
        for future in futures:
            future.result()
    finally:
        queue.clear()  # after an error or an interrupt nothing new starts
