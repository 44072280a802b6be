"""Which part of the chip bounds an attention: the time each would need alone, the longest of them, and how near we are.

    tensor  FLOPs of the active pairs / matrix rate
    exp     one exponential per active pair / rate of the special-function units
    l2      keys and values, read from the second-level cache once for every tile of queries / its bandwidth
    memory  each tensor once, to or from device memory / its bandwidth
    launch  kernels x the time that one launch takes

A kernel that overlaps all of them perfectly needs the longest. Rates are the data sheet's (`machine.PEAKS`), replaced
by what was measured where that is lower or where the chip is not in the table; matrix and memory rates are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .machine import Peak, peak_of
from .timing import Clock


@dataclass(frozen=True)
class Ceilings:
    """Rates of the machine; 0 = unknown, such a term is left out.

    tensor  TFLOP/s, memory and l2 TB/s, exp 10^12 a second, launch microseconds
    """

    tensor: float
    memory: float
    exp: float
    l2: float
    launch: float
    sheet_tensor: float = 0.0
    sheet_memory: float = 0.0


@dataclass(frozen=True)
class Work:
    """What one call has to do. bytes: device memory; l2_bytes: cache reads of keys and values; launches: kernels."""

    flops: float
    exps: float
    bytes: float
    l2_bytes: float
    launches: int


def attention_work(
    pairs: float, q_len: int, kv_len: int, heads: int, head_dim: int, itemsize: int, tile_m: int, launches: int = 1
) -> Work:
    """Work of a forward over `pairs` active (query, key) pairs, all heads and samples counted."""
    tensors = 2 * heads * (q_len + kv_len) * head_dim * itemsize
    return Work(
        flops=4.0 * pairs * head_dim,
        exps=pairs,
        bytes=tensors + 4.0 * heads * q_len,
        l2_bytes=2.0 * pairs / tile_m * head_dim * itemsize,
        launches=launches,
    )


def terms(work: Work, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds of each term that the ceilings know."""
    found = {"launch": work.launches * ceilings.launch * 1e-3}
    for name, amount, rate in (
        ("tensor", work.flops, ceilings.tensor),
        ("exp", work.exps, ceilings.exp),
        ("l2", work.l2_bytes, ceilings.l2),
        ("memory", work.bytes, ceilings.memory),
    ):
        if rate:
            found[name] = amount / rate * 1e-9
    return found


def roofline(work: Work, ms: float, ceilings: Ceilings) -> dict[str, Any]:
    """{"bound": term, "floor_ms", "of_floor": floor / measured, "terms_ms"} of a row that took `ms`."""
    each = terms(work, ceilings)
    bound = max(each, key=lambda name: each[name])
    floor = each[bound]
    return {"bound": bound, "floor_ms": floor, "of_floor": floor / ms, "terms_ms": each}


def measure_ceilings(device: str, clock: Clock, reduced: bool) -> tuple[Ceilings, dict[str, Any]]:
    """Ceilings of this machine, and the measured figures behind them for the record."""
    matmul, copy = _matmul_rate(device, clock, reduced), _copy_rate(device, clock, reduced)
    launch = _launch_us(device)
    sheet = peak_of(torch.cuda.get_device_name(0)) if device != "cpu" else None
    exp = sheet.exp_rate if sheet else _exp_rate(device, clock)
    measured = {"matmul_tflops": matmul, "copy_tbs": copy, "launch_us": launch}
    sheet = sheet or Peak(0.0, 0.0, 0, 0.0)
    ceilings = Ceilings(matmul, copy, exp, sheet.l2, launch, sheet.tensor, sheet.memory)
    return ceilings, {**measured, "ceilings": asdict(ceilings)}


def _matmul_rate(device: str, clock: Clock, reduced: bool) -> float:
    """TFLOP/s of a square matrix product on random data, the best of some; 16 bit on a GPU."""
    n = 1024 if reduced else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    return 2 * n**3 / clock.time(lambda: a @ b).low * 1e-9


def _copy_rate(device: str, clock: Clock, reduced: bool) -> float:
    """TB/s of a copy within device memory, bytes read and bytes written counted."""
    source = torch.ones((1 << 24) if reduced else (1 << 30), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.time(lambda: target.copy_(source)).low * 1e-9


def _launch_us(device: str) -> float:
    """Microseconds between the ends of two empty launches."""
    x = torch.zeros(1, device=device)
    wait: Callable[[], None] = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    for _ in range(20):
        x.add_(1)
    wait()
    start = time.perf_counter()
    for _ in range(500):
        x.add_(1)
    wait()
    return 1e6 * (time.perf_counter() - start) / 500


def _exp_rate(device: str, clock: Clock) -> float:
    """10^12 exponentials a second on data in the cache: of the CPU, or of a chip that is not in the table (a lower
    bound there, since PyTorch's kernel waits for memory)."""
    x = torch.rand(1 << 18, device=device)
    return x.numel() / clock.time(lambda: torch.exp(x)).low * 1e-9
