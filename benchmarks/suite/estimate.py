"""Speed-ups of GPUs that nobody has measured yet, from a cost model with its numbers in the open.

    dense  = FLOPs / (dense_rate x peak) + launch
    sparse = waves(FLOPs x (1 - sparsity)) / (sparse_rate x peak) + extra

waves: programs of 128 queries fill the multiprocessors a whole number of times, which matters for short sequences.
The rates are shares of the data-sheet peak that public figures give for dense attention (cuDNN or FlashAttention,
whichever PyTorch has on that chip) and for block-sparse Triton kernels; `extra` is what our op launches besides. They
are leads, not measurements: a run of gpu_suite.py takes their place.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass

import dynamicrad_compile as drad
from dynamicrad_compile.plans import crossover

from .machine import PEAKS

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 69120, 142080)
SPARSITIES = (0.3, 0.5, 0.8, 0.9)
HEADS = 24
LAUNCH_US, EXTRA_US = 5.0, 25.0


@dataclass(frozen=True)
class Rates:
    """Chip of PEAKS that stands for the architecture, and shares of its peak at head_dim 128 and 64."""

    chip: str
    dense: tuple[float, float]
    sparse: tuple[float, float]
    programs: int  # of a multiprocessor at a time


RATES: dict[str, Rates] = {
    "sm_80": Rates("A100", (0.65, 0.60), (0.55, 0.50), 1),
    "sm_86": Rates("RTX 3090", (0.75, 0.70), (0.65, 0.60), 1),
    "sm_89": Rates("RTX 4090", (0.85, 0.80), (0.75, 0.70), 1),
    "sm_90": Rates("H100", (0.57, 0.42), (0.38, 0.32), 1),
    "sm_100": Rates("B200", (0.55, 0.45), (0.25, 0.20), 1),
    "sm_120": Rates("RTX 5090", (0.85, 0.80), (0.70, 0.65), 1),
}


def estimated_ratio(rates: Rates, tokens: int, head_dim: int, sparsity: float) -> float:
    """Dense time / sparse time of one attention with HEADS heads."""
    peak = PEAKS[rates.chip]
    narrow = head_dim <= 64
    flops = 4.0 * tokens**2 * head_dim * HEADS
    dense = flops / (rates.dense[narrow] * peak.tensor * 1e12) + LAUNCH_US * 1e-6
    programs = math.ceil(tokens / 128) * HEADS
    slots = peak.sms * rates.programs
    full = math.ceil(programs / slots) * slots / programs
    sparse = full * flops * (1 - sparsity) / (rates.sparse[narrow] * peak.tensor * 1e12)
    return dense / (sparse + (LAUNCH_US + EXTRA_US) * 1e-6)


def estimated_tables() -> list[crossover.Table]:
    """A table for each architecture of RATES, labelled as estimated."""
    tables = []
    for arch, rates in RATES.items():
        rows = tuple(
            crossover.Row(tokens, dim, sparsity, round(estimated_ratio(rates, tokens, dim, sparsity), 3))
            for tokens in LENGTHS
            for dim in (64, 128)
            for sparsity in SPARSITIES
        )
        tables.append(crossover.Table(
            arch=arch, dtype="half", source="estimated", machine=f"cost model, {rates.chip}",
            date=datetime.date.today(), versions=f"dynamicrad {drad.__version__}",
            command="python benchmarks/crossover.py estimate", rows=rows,
        ))  # fmt: skip
    return tables
