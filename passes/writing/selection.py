"""Nodes of dynamic_threshold: which of a plan's candidates a call reads.

    %counts, %indices = select_blocks(%q, %k, %candidates ..., %thresholds, scale, ..., rank)

With refresh_steps the choice is kept outside the graph (see `buffers`), and most steps read what an earlier one chose
(AdaSpa, arXiv 2502.21079: patterns are nearly the same in all denoising steps):

    %counts, %indices = select_or_keep((%q, %k, ...), %kept_counts, %kept_indices, %refresh)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from dynamicrad_compile.kernels import select_op as _registers_the_op  # noqa: F401
from dynamicrad_compile.kernels.select_arguments import Selection, with_state
from dynamicrad_compile.plans.stages import ONE_STAGE
from dynamicrad_compile.runtime.pool import Slot

from ..site import PlannedSite
from .buffers import state_node
from .control import Controls, PlanNodes


@has_side_effect
def select_or_keep(
    selection: tuple[Any, ...], kept_counts: Tensor, kept_indices: Tensor, refresh: Tensor, num_kv: int
) -> tuple[Tensor, Tensor]:
    """Counts int32 [B, H, Mq] and indices [B, H, Mq, W] in force; chosen anew where refresh, bool [1], is True.

    selection: the arguments of select_blocks. Rows that are dense at this step are dense whatever was kept.
    """
    torch.ops.dynamicrad.select_blocks_(*with_state(selection, (kept_counts, kept_indices, refresh)))
    counts = Selection(*selection).kv_counts
    return torch.where(counts >= num_kv, counts, kept_counts), kept_indices


def columns(table: Tensor, start: int, number: int) -> Tensor:
    """Columns of a table, contiguous."""
    return table[:, start : start + number].contiguous()


def either(use: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Counts and indices of `first` for the rows of the batch whose `use`, [1 or B, 1], is not 0, else of `second`."""
    chosen = (use != 0)[..., None]
    return torch.where(chosen, first[0], second[0]), torch.where(chosen[..., None], first[1], second[1])


def select(
    gm: fx.GraphModule,
    planned: PlannedSite,
    operands: Sequence[fx.Node],
    keys: fx.Node | None,
    nodes: PlanNodes,
    controls: Controls,
    num_kv: int | None,
) -> PlanNodes:
    """The plan that a site reads out of the candidates `nodes`; num_kv is None where it is symbolic."""
    video, plan, criteria = planned.video, planned.table.plan, planned.table.criteria
    call = gm.graph.call_function
    scale = None if video.call.scale is None else float(video.call.scale)
    query, key, _ = operands

    def arguments(place: int) -> tuple[Any, ...]:
        thresholds = call(columns, (nodes.thresholds, 3 * place, 2))
        candidates = (nodes.counts, nodes.indices, nodes.forced, nodes.near, thresholds)
        criterion, rank = criteria[place]
        return (query, key, *candidates, scale, plan.block_q, plan.block_kv, criterion, keys, rank)

    pair = None
    stages = ONE_STAGE if planned.spec is None else planned.spec.stages
    if controls.control.refresh_steps and num_kv is not None:
        batch, heads = video.shape[:2]
        counts, indices = (t[:1].to(controls.device) for t in (plan.kv_counts, plan.kv_indices))
        kept = (
            state_node(gm, controls.context, Slot("kept_counts", lambda: counts.repeat(batch, heads, 1))),
            state_node(gm, controls.context, Slot("kept_indices", lambda: indices.repeat(batch, heads, 1, 1))),
        )
        pair = call(select_or_keep, (arguments(0), *kept, controls.refresh(stages), num_kv))
    else:
        for place in range(len(criteria)):  # of several, each row of the batch takes that of its regime
            chosen = call(torch.ops.dynamicrad.select_blocks.default, arguments(place))
            if pair is not None:
                chosen = call(either, (call(columns, (nodes.thresholds, 3 * place + 2, 1)), chosen, pair))
            pair = chosen
    return replace(nodes, counts=call(operator.getitem, (pair, 0)), indices=call(operator.getitem, (pair, 1)))
