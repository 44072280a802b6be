"""Times of a call on a device: median and spread over repeats, the cache emptied before each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_REPEATS, MAX_REPEATS = 5, 60


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, the 20th and 80th percentile, and how many calls there were."""

    ms: float
    low: float
    high: float
    repeats: int

    @property
    def spread(self) -> float:
        """(80th - 20th percentile) / median."""
        return (self.high - self.low) / self.ms if self.ms else 0.0

    @staticmethod
    def of(times: list[float]) -> Timing:
        """From single times."""
        ordered = sorted(times)
        at = [ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))] for share in (0.2, 0.8)]
        return Timing(statistics.median(ordered), at[0], at[1], len(ordered))


@dataclass
class Clock:
    """Times calls on one device.

    budget_ms   time that the repeats of one measurement may take together
    """

    device: str
    budget_ms: float = 250.0
    min_repeats: int = MIN_REPEATS
    _flush: torch.Tensor | None = field(default=None, repr=False)

    def time(self, call: Callable[[], Any]) -> Timing:
        """Timing of a call. The first call, which may compile, and one more are not counted."""
        call()
        first = self._once(call)
        wanted = int(self.budget_ms / max(first, 1e-3))
        repeats = max(self.min_repeats, min(MAX_REPEATS, wanted))
        if self.device == "cpu":
            return Timing.of([self._once(call) for _ in range(repeats)])
        return Timing.of(self._events(call, repeats))

    def time_in_turns(self, calls: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        """Timings of several calls that take turns, so that whatever disturbs the machine meets all alike."""
        first = 0.0
        for call in calls.values():
            call()
            first += self._once(call)
        rounds = max(self.min_repeats, min(MAX_REPEATS, int(self.budget_ms * len(calls) / max(first, 1e-3))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self._once(call))
        return {name: Timing.of(several) for name, several in times.items()}

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device != "cpu":
            return self._events(call, 1)[0]
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def _events(self, call: Callable[[], Any], repeats: int) -> list[float]:
        if self._flush is None:  # four times the second-level cache, and at least 256 MiB
            size = max(256 << 20, 4 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0))
            self._flush = torch.empty(size, dtype=torch.int8, device=self.device)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def time_graph(self, call: Callable[[], Any]) -> Timing:
        """Timing of a replay of the call as a CUDA graph: the kernels without their launches from Python."""
        graph = capture(call)
        return self.time(graph.replay)


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, after warming up on a side stream as PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call needs beyond what is allocated before it; None on the CPU, where nothing counts them."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
