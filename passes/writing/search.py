"""Nodes of a pattern that searches (AdaSpa, arXiv 2502.21079): an earlier step found the blocks that a site reads.

    %counts = in_force(%kept_counts, %counts_of_plan, %clock)      the plan has what is always read, and dense rows
    %pair = block_sparse_attention(%q, %k, %v, %counts, %kept_indices, ...)
    search_or_keep((%q, %k, ...), %pair[1], %kept ..., %clock)     looks at the scores of all pairs, at its steps

Everything that is kept lies outside the graph (see `buffers`). Up to the first search all is dense, so the attention of
its step gives the exact log-sum-exp of each query; later searches reuse it, since it changes little from step to step.
What a search finds is read from the next call on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from dynamicrad_compile.kernels import search_op as _registers_the_op  # noqa: F401
from dynamicrad_compile.kernels.search_arguments import with_search_state
from dynamicrad_compile.runtime.account import new_search_stats
from dynamicrad_compile.runtime.clock import STEP, is_first_call_of
from dynamicrad_compile.runtime.pool import Slot

from ..context import PassContext
from ..site import PlannedSite
from .buffers import state_node
from .control import Controls, PlanNodes


@dataclass(frozen=True)
class Kept:
    """Nodes of what a site keeps from step to step, and of the sums of its searches, whose slot is `stats`."""

    lse: fx.Node
    counts: fx.Node
    indices: fx.Node
    recall: fx.Node
    sums: fx.Node
    stats: str


def in_force(kept: Tensor, counts: Tensor, num_kv: int, clock: Tensor, first: int) -> Tensor:
    """int32 [B, H, Mq]: what was found, int32 [B, H, Mq]; full up to step `first`, and where `counts` is."""
    dense = (counts >= num_kv) | (clock[STEP] <= first)
    return torch.where(dense, torch.full_like(kept, num_kv), kept)


@has_side_effect
def search_or_keep(
    search: tuple[Any, ...], lse: Tensor, kept: tuple[Tensor, ...], sums: Tensor, clock: Tensor, steps: tuple[int, ...]
) -> None:
    """Search anew at the first call of each of `steps`; the first one also keeps the log-sum-exp, fp32 [B, H, Sq].

    search: the arguments of search_blocks without lse. kept: lse, counts, indices, recall.
    """
    q, k, *rest = search
    kept_lse, *choice = kept
    first, due = is_first_call_of(clock, steps[:1]), is_first_call_of(clock, steps)
    kept_lse.copy_(torch.where(first, lse.detach(), kept_lse))
    arguments = with_search_state((q.detach(), k.detach(), kept_lse, *rest), (*choice, due))
    torch.ops.dynamicrad.search_blocks_(*arguments)
    found = torch.cat([torch.ones_like(sums[:1]), choice[-1].mean(0).to(sums.dtype)])
    sums.add_(torch.where(due, found, torch.zeros_like(found)))


def keep(gm: fx.GraphModule, context: PassContext, planned: PlannedSite, device: torch.device) -> Kept:
    """The state of a site."""
    plan, (batch, heads) = planned.table.plan, planned.video.shape[:2]
    rows, blocks = plan.num_q_blocks, plan.num_kv_blocks

    def full(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    def slot(name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> fx.Node:
        return state_node(gm, context, Slot(name, functools.partial(full, shape, value, dtype)))

    kept = (
        slot("kept_lse", (batch, heads, plan.q_len), 0.0, torch.float32),
        slot("kept_counts", (batch, heads, rows), blocks, torch.int32),
        slot("kept_indices", (batch, heads, rows, blocks), 0, torch.int32),
        slot("kept_recall", (batch, heads), 1.0, torch.float32),
    )
    sums = state_node(gm, context, Slot("searches", functools.partial(new_search_stats, heads, device), "model"))
    return Kept(*kept, sums, "" if context.is_final else context.slots[-1].name)


def found_blocks(planned: PlannedSite, nodes: PlanNodes, kept: Kept, controls: Controls) -> PlanNodes:
    """The plan that a site reads: what was found, and the rows of `nodes` that are dense."""
    found, num_kv = planned.table.searches, planned.table.plan.num_kv_blocks
    assert found is not None
    arguments = (kept.counts, nodes.counts, num_kv, controls.clock(), found.search_steps[0])
    counts = controls.graph.call_function(in_force, arguments)
    return replace(nodes, counts=counts, indices=kept.indices)


def search(
    gm: fx.GraphModule,
    planned: PlannedSite,
    operands: Sequence[fx.Node],
    keys: fx.Node | None,
    nodes: PlanNodes,
    kept: Kept,
    lse: fx.Node,
    controls: Controls,
) -> None:
    """Search behind a site's attention, whose log-sum-exp is `lse`; nodes: what is always read."""
    found, plan, call = planned.table.searches, planned.table.plan, gm.graph.call_function
    assert found is not None
    scale = None if planned.video.call.scale is None else float(planned.video.call.scale)
    always = (nodes.counts, nodes.indices)
    how = (planned.table.to_skip, found.recall_threshold, scale, plan.block_q, plan.block_kv, keys, found.rank)
    state = (kept.lse, kept.counts, kept.indices, kept.recall)
    arguments = ((*operands[:2], *always, *how), lse, state, kept.sums, controls.clock(), found.search_steps)
    call(search_or_keep, arguments)
