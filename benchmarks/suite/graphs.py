"""CUDA graphs: capture once, change counts and thresholds in place, replay, compare with eager code.

This is what a denoising step does when the regime or the gate changes: the graph stays, the numbers change.
On the CPU, which has no graphs, the same changes are made between two plain calls, so that this code is run there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import dynamicrad_compile as drad
from dynamicrad_compile.plans.make import make_candidates
from dynamicrad_compile.plans.selection import select_blocks

from .bench import Bench
from .runner import Row, Values
from .timing import capture


def rows(bench: Bench, tokens: int, dim: int) -> Iterator[Row]:
    """Replay checks of the attention alone, and of selection followed by attention."""
    facts = {"tokens": tokens, "head_dim": dim}
    yield Row(f"graph/attention/{tokens}/{dim}", "graphs", lambda: run_attention(bench, tokens, dim), 6.0, facts)
    yield Row(f"graph/selection/{tokens}/{dim}", "graphs", lambda: run_selection(bench, tokens, dim), 6.0, facts)


class Replay:
    """A call whose outputs stay where they are: a CUDA graph, or on the CPU a plain call."""

    def __init__(self, call: Callable[[], torch.Tensor], device: str):
        self.out = call()
        self.call = call
        self.graph: Any = None
        if device != "cpu":

            def kept() -> None:
                self.out = call()

            self.graph = capture(kept)

    def __call__(self) -> torch.Tensor:
        if self.graph is None:
            self.out = self.call()
        else:
            self.graph.replay()
        return self.out


def _compare(bench: Bench, replay: Replay, eager: Callable[[], torch.Tensor], changes: dict[str, Any]) -> Values:
    """After each change the replay must give the bits of eager code, and not those of before."""
    before = replay().clone()
    checked = []
    for name, change in changes.items():
        change()
        got = replay().clone()
        if not torch.equal(got, eager()):
            raise AssertionError(f"after the change of {name} a replay differs from eager code")
        if torch.equal(got, before):
            raise AssertionError(f"the change of {name} had no effect on the replay")
        before = got
        checked.append(name)
    kind = "plain calls" if replay.graph is None else "graph replays"
    return {"checked": checked, "summary": f"{kind} follow {', '.join(checked)}"}


def run_attention(bench: Bench, tokens: int, dim: int) -> Values:
    """Counts and ids change in place, as a gate and a router change them."""
    plan = bench.plan(tokens, 0.8)
    plan = replace(plan, kv_counts=plan.kv_counts.clone(), kv_indices=plan.kv_indices.clone())
    other = bench.plan(tokens, 0.9)
    q, k, v = bench.qkv(tokens, dim)
    call = lambda: drad.block_sparse_attention(q, k, v, plan)  # noqa: E731

    def narrower() -> None:
        width = other.kv_indices.shape[-1]
        plan.kv_counts.copy_(other.kv_counts.clamp(max=plan.kv_indices.shape[-1]))
        plan.kv_indices[..., :width] = other.kv_indices[..., : plan.kv_indices.shape[-1]]

    changes = {
        "rows made dense": lambda: plan.kv_counts[..., ::2].fill_(plan.num_kv_blocks),
        "another plan": narrower,
        "every row dense": lambda: plan.kv_counts.fill_(plan.num_kv_blocks),
    }
    return _compare(bench, Replay(call, bench.device), call, changes)


def run_selection(bench: Bench, tokens: int, dim: int) -> Values:
    """Thresholds and queries change in place; the selection in the graph follows."""
    q, k, v = bench.qkv(tokens, dim)
    block = 32 if bench.reduced else 128  # or there is nothing to choose
    candidates = make_candidates(bench.shapes[tokens][0], block, sparsity=0.3).to(bench.device)
    thresholds = torch.tensor([[0.8, 0.8]]).to(bench.device)

    def call() -> torch.Tensor:
        return drad.block_sparse_attention(q, k, v, select_blocks(q, k, candidates, thresholds, "ratio"))

    changes = {"thresholds": lambda: thresholds.fill_(0.3), "queries": lambda: q.copy_(q.flip(2))}
    return _compare(bench, Replay(call, bench.device), call, changes)
