"""Executors that answer out of order, and functions for workers that die or fail; importable in spawned processes."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path

from dynamicrad_compile.tuning import search


class Reversed:
    """Does nothing until `batch` futures are waited for, then the calls in this thread, the last one first."""

    def __init__(self, batch):
        self.batch = batch
        self.calls = []
        self.jobs = []

    def submit(self, function, *arguments):
        future = Awaited(self)
        self.jobs.append(arguments[1])
        self.calls.append((future, function, arguments))
        return future

    def flush(self):
        while self.calls:
            future, function, arguments = self.calls.pop()
            future.set_result(function(*arguments))


class Awaited(Future):
    """Tells its executor when it is waited for and enough others are."""

    def __init__(self, executor):
        super().__init__()
        self.executor = executor

    def add_done_callback(self, callback):
        super().add_done_callback(callback)
        if len(self.executor.calls) == self.executor.batch:
            self.executor.flush()


class Uneven:
    """Every call in a thread of its own, which begins after up to 50 ms."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def submit(self, function, *arguments):
        future = Future()
        threading.Timer(self.random.uniform(0, 0.05), lambda: future.set_result(function(*arguments))).start()
        return future


class Dying:
    """Hands calls on to another executor; the worker that gets the first one kills itself, `times` times."""

    def __init__(self, executor, folder, times=1):
        self.executor = executor
        self.folder = str(folder)
        self.times = times

    def submit(self, function, *arguments):
        return self.executor.submit(die_first, self.folder, self.times, function, *arguments)


class Lost:
    """Hands all calls on but those of the evaluation `index`, whose workers die."""

    def __init__(self, executor, index):
        self.executor = executor
        self.index = index

    def submit(self, function, *arguments):
        if arguments[1].index != self.index:
            return self.executor.submit(function, *arguments)
        raise BrokenExecutor("all workers are gone")


def die_first(folder, times, function, *arguments):
    """End this process at once, unless that has been done so often; then the function's result."""
    for number in range(times):
        try:
            Path(folder, f"died{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os._exit(1)
    return function(*arguments)


def run_job_or_die(folder, times, job):
    """The search's `run_job` on a worker that dies first."""
    return die_first(folder, times, search.run_job, job)


def double(number):
    return 2 * number


def fail_at_three(number):
    if number == 3:
        raise ValueError("three is refused")
    return number


def worker():
    return os.getpid()
