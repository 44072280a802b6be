"""What the rows share: device, clock, ceilings, shapes, and the figures of earlier rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dynamicrad_compile as drad
from dynamicrad_compile.plans.plan import BlockPlan

from .roofline import Ceilings
from .runner import Journal, Values
from .timing import Clock

# Tokens -> (frames, height, width) and heads. 49 frames of 512x320, 81 of 832x480, 69 and 145 of 1280x768. Long ones
# have fewer heads, so that a dense call stays below 0.1 s; they still fill the chip several times over.
SHAPES: dict[int, tuple[tuple[int, int, int], int]] = {
    8320: ((13, 20, 32), 40),
    32760: ((21, 30, 52), 40),
    69120: ((18, 48, 80), 12),
    142080: ((37, 48, 80), 4),
}
# Short ones, for the crossover to dense.
SHORT_SHAPES: dict[int, tuple[tuple[int, int, int], int]] = {
    1024: ((4, 16, 16), 24),
    2048: ((8, 16, 16), 24),
    4096: ((8, 16, 32), 24),
}
REDUCED_SHAPES: dict[int, tuple[tuple[int, int, int], int]] = {512: ((4, 8, 16), 2), 1012: ((4, 11, 23), 2)}
BLOCK = 128


@dataclass
class Bench:
    """One run: where, with what, and what is known so far.

    codegen  models go through Inductor; else they run as captured
    flex     FlexAttention compiled for (tokens, head_dim)
    """

    device: str
    reduced: bool
    codegen: bool
    dtype: torch.dtype
    clock: Clock
    journal: Journal
    ceilings: Ceilings
    flex: dict[tuple[int, int], Callable[..., Any]] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[int, tuple[tuple[int, int, int], int]]:
        """Tokens -> grid and heads of every shape."""
        return REDUCED_SHAPES if self.reduced else {**SHORT_SHAPES, **SHAPES}

    def plan(self, tokens: int, sparsity: float, compensate: float = 0.0) -> BlockPlan:
        """Plan of pattern "dynamicrad" on the device; all blocks at sparsity 0."""
        return _plan(self.shapes[tokens][0], sparsity, compensate).to(self.device)

    def qkv(self, tokens: int, head_dim: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v [1, heads, tokens, head_dim], permuted from [1, tokens, heads, head_dim] as in a model."""
        generator = torch.Generator(self.device).manual_seed(tokens + head_dim)
        shape = (1, tokens, self.shapes[tokens][1], head_dim)
        made = (torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) for _ in range(3))
        q, k, v = (x.transpose(1, 2).requires_grad_(grad) for x in made)
        return q, k, v

    def found(self, name: str) -> Values | None:
        """An earlier row of this run that succeeded."""
        return next((r for r in self.journal.rows if r["name"] == name and r["status"] == "ok"), None)

    def timed(self, call: Callable[[], Any]) -> Values:
        """ms, low, high, spread and repeats of a call, and graph_ms where launches may count."""
        timing = self.clock.time(call)
        values = {
            "ms": timing.ms, "low_ms": timing.low, "high_ms": timing.high,
            "spread": timing.spread, "repeats": timing.repeats, "graph_ms": None,
        }  # fmt: skip
        if self.device != "cpu" and timing.ms < 2.0:
            try:
                values["graph_ms"] = self.clock.time_graph(call).ms
            except RuntimeError as error:
                values["graph_why"] = str(error)[:160]
        return values

    @property
    def backend(self) -> str:
        """torch.compile's backend for what is not ours."""
        return "inductor" if self.codegen else "eager"


@functools.lru_cache(maxsize=32)
def _plan(grid: tuple[int, int, int], sparsity: float, compensate: float) -> BlockPlan:
    if sparsity == 0.0:
        return drad.make_plan("dense", grid, BLOCK)
    return drad.make_plan("dynamicrad", grid, BLOCK, sparsity=sparsity, compensate=compensate)


def active_pairs(plan: BlockPlan, heads: int) -> float:
    """(query, key) pairs in the active blocks of a plan that all heads share; partial last blocks count as they are."""
    counts, ids = plan.kv_counts[0, 0].cpu().long(), plan.kv_indices[0, 0].cpu()
    m_k = plan.num_kv_blocks
    active = torch.arange(ids.shape[-1]) < counts[:, None]
    short = m_k * plan.block_kv - plan.kv_len
    keys = counts * plan.block_kv - torch.where((active & (ids == m_k - 1)).any(-1), short, 0)
    keys = torch.where(counts >= m_k, plan.kv_len, keys)
    rows = torch.full_like(keys, plan.block_q)
    rows[-1] = plan.q_len - (len(rows) - 1) * plan.block_q
    return float((keys * rows).sum()) * heads
