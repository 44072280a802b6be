"""Nodes of dynamic_threshold: which of a plan's candidates a call reads.

    %counts, %indices = select_blocks(%q, %k, %candidates ..., %thresholds, scale, ...)

With refresh_steps the choice is kept in buffers of the graph, and most steps read what an earlier one chose (AdaSpa,
arXiv 2502.21079: patterns are nearly the same in all denoising steps):

    %counts, %indices = select_or_keep(%q, %k, ..., %kept_counts, %kept_indices, %refresh)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from dynamicrad_compile.kernels import select_blocks as _registers_the_op  # noqa: F401

from ._buffers import buffer_node
from ._control import Controls, PlanNodes
from ._site import Site


@has_side_effect
def select_or_keep(
    q: Tensor,
    k: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_forced: Tensor,
    kv_near: Tensor,
    thresholds: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    criterion: str,
    kv_mask: Tensor | None,
    kept_counts: Tensor,
    kept_indices: Tensor,
    refresh: Tensor,
    num_kv: int,
) -> tuple[Tensor, Tensor]:
    """Counts int32 [B, H, Mq] and indices [B, H, Mq, W] in force; chosen anew where refresh, bool [1], is True.

    Rows that are dense at this step are dense whatever was kept.
    """
    torch.ops.dynamicrad.select_blocks_(
        q, k, kv_counts, kv_indices, kv_forced, kv_near, thresholds, scale, block_q, block_kv, criterion,
        kept_counts, kept_indices, refresh, kv_mask,
    )  # fmt: skip
    return torch.where(kv_counts >= num_kv, kv_counts, kept_counts), kept_indices


def select(
    gm: fx.GraphModule,
    site: Site,
    operands: Sequence[fx.Node],
    keys: fx.Node | None,
    nodes: PlanNodes,
    controls: Controls,
    num_kv: int | None,
) -> PlanNodes:
    """The plan that a site reads out of the candidates `nodes`; num_kv is None where it is symbolic."""
    assert site.plan is not None
    assert site.q_shape is not None
    graph, plan, criterion = gm.graph, site.plan.plan, site.plan.criterion
    scale = None if site.call.scale is None else float(site.call.scale)
    query, key, _ = operands
    candidates = (nodes.counts, nodes.indices, nodes.forced, nodes.near, nodes.thresholds)
    arguments = (query, key, *candidates, scale, plan.block_q, plan.block_kv, criterion, keys)
    if controls.control.refresh_steps and num_kv is not None:
        batch, heads = site.q_shape[:2]
        counts, indices = (t[:1].to(controls.device) for t in (plan.kv_counts, plan.kv_indices))
        kept = (
            buffer_node(gm, "kept_counts", counts.repeat(batch, heads, 1)),
            buffer_node(gm, "kept_indices", indices.repeat(batch, heads, 1, 1)),
        )
        pair = graph.call_function(select_or_keep, (*arguments, *kept, controls.refresh(), num_kv))
    else:
        pair = graph.call_function(torch.ops.dynamicrad.select_blocks.default, arguments)
    return replace(
        nodes,
        counts=graph.call_function(operator.getitem, (pair, 0)),
        indices=graph.call_function(operator.getitem, (pair, 1)),
    )
