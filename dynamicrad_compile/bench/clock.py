"""What a time depends on, and how times are taken: the machine, the versions, calls in turn."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """Name of the CPU, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> str:
    """One line: the chip and what its speed depends on, and the software."""
    if device == "cpu":
        threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
        chip = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    else:
        chip = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    ours = importlib.metadata.version("dynamicrad-compile")
    return f"{chip}; torch {torch.__version__}, dynamicrad-compile {ours}, Python {platform.python_version()}"


def fastest(calls: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Seconds of the fastest of `repeats` calls of each; the calls take turns, so that drift meets all alike."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
