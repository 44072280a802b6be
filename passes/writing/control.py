"""Nodes that decide, when a graph runs, in which regime and at which step it is; see `runtime`.

    %clock = advance(%timestep, %state)                            once a graph, behind its inputs
    %dense = stays_dense(%clock, dense_steps, dense_timestep)
    %regime = latch(route(%prompt, %mask, *tensors of the router), %clock, %latched)

%state and %latched are inputs that were added to the graph (see `buffers`).

    %stage = stage_of(%clock, stages of the run)                   once for plans that differ by step
    %counts = index_select(%table_of_counts, 0, %regime)           once a plan: each row of the batch in its regime
    %counts = gated(%counts, %dense, number of kv blocks)          a full count is dense attention

Nothing is added to a graph whose plan has one regime, one stage and no dense steps. An exported program keeps no regime
from call to call: it routes the prompt that it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dynamicrad_compile.plans.stages import Stages
from dynamicrad_compile.runtime import clock, regimes, stage
from dynamicrad_compile.runtime.pool import Slot
from dynamicrad_compile.runtime.router import route

from ..context import PassContext
from ..graph import shape_hint
from ..site import PlannedSite
from .buffers import buffer_node, state_node


@dataclass(frozen=True)
class PlanNodes:
    """Nodes of a plan table's tensors (see PlanTable.tensors), and of the weights of compensation.

    The orders of keys and of queries and their inverses are int64 [1 or B, S], None where plans are for tokens as they
    come.
    """

    counts: fx.Node
    indices: fx.Node
    forced: fx.Node | None = None
    near: fx.Node | None = None
    thresholds: fx.Node | None = None
    order: fx.Node | None = None
    inverse: fx.Node | None = None
    q_order: fx.Node | None = None
    q_inverse: fx.Node | None = None
    compensate: fx.Node | None = None

    def each(self, change: Callable[[fx.Node], fx.Node]) -> PlanNodes:
        """The same with `change` applied to every node."""
        given = {node: None for node in vars(self).values() if node is not None}
        changed = {node: change(node) for node in given}
        return PlanNodes(*(None if node is None else changed[node] for node in vars(self).values()))


def gated(counts: torch.Tensor, dense: torch.Tensor, indices: torch.Tensor, num_kv: int | None) -> torch.Tensor:
    """kv_counts with full rows where `dense`; num_kv None: the width of the indices is the number of kv blocks."""
    full = indices.shape[-1] if num_kv is None else num_kv
    return torch.where(dense, torch.full_like(counts, full), counts)


def one_order(planned: PlannedSite) -> bool:
    """Whether all regimes have the same order of tokens, or none."""
    orders = (planned.table.plan.order, planned.table.plan.query_order)
    return all(order is None or len(order) == 1 for order in orders)


def safest(chosen: torch.Tensor) -> torch.Tensor:
    """int64 [1]: the regime of most motion."""
    return chosen.amax(0, keepdim=True)


class Controls:
    """Makes the nodes of one graph, each once, when a plan first needs them."""

    def __init__(self, gm: fx.GraphModule, context: PassContext, device: torch.device):
        self.gm, self.graph, self.device, self.context = gm, gm.graph, device, context
        self.control, self.conditions = context.decisions.control, context.conditions
        prompt = shape_hint(context.conditions.prompt) if context.conditions.prompt is not None else None
        self.prompts = prompt[0] if prompt else 0
        few = 0 < self.prompts <= regimes.MAX_BATCH
        self.latches = few and context.conditions.timestep is not None and not context.is_final
        self.made: dict[str, fx.Node] = {}
        inputs = gm.graph.find_nodes(op="placeholder")
        self.begin = inputs[-1].next if inputs else next(iter(gm.graph.nodes))

    def choose(self, nodes: PlanNodes, planned: PlannedSite, num_kv: int | None) -> PlanNodes:
        """The plan of this call out of a table: rows in their regime, dense at dense steps.

        The graph's insertion point must be behind `nodes`. num_kv: number of kv blocks, None where it is symbolic.
        """
        call = self.graph.call_function
        weights = planned.table.plan.compensation()
        if weights is not None:
            nodes = replace(nodes, compensate=buffer_node(self.gm, "compensate", weights.to(self.device)))
        if len(planned.table.plan.kv_counts) > 1:
            rows = self._rows_for(planned)
            names = ("order", "inverse", "q_order", "q_inverse") if one_order(planned) else ()
            shared = {name: getattr(nodes, name) for name in names}
            of_regimes = replace(nodes, **dict.fromkeys(shared))
            nodes = replace(of_regimes.each(lambda node: call(torch.index_select, (node, 0, rows))), **shared)
        if self.control.gates:
            nodes = replace(nodes, counts=call(gated, (nodes.counts, self.dense(), nodes.indices, num_kv)))
        return nodes

    def refresh(self, stages: Stages) -> fx.Node:
        """Node of bool [1]: whether blocks are to be chosen anew: at every so many steps, and where a stage begins."""
        control = self.control
        due = self._once(
            "refresh", clock.is_refresh, lambda: (self.clock(), control.dense_steps, control.refresh_steps)
        )
        if not stages.starts:
            return due
        starts = (stages.starts, stages.by, stages.falling)
        begins = self._once(f"begins {stages}", stage.begins, lambda: (self.clock(), *starts))
        return self._once(f"refresh {stages}", torch.logical_or, lambda: (due, begins))

    def dense(self) -> fx.Node:
        """Node of bool []: whether all sites are dense at this step."""
        control = self.control
        return self._once(
            "dense", clock.stays_dense, lambda: (self.clock(), control.dense_steps, control.dense_timestep)
        )

    def clock(self) -> fx.Node:
        """Node of the step clock, fp32 [9], with this call in it."""
        if self.control.has_clock:
            return self._kept("clock", clock.new_clock, beside=True)
        return self._once(
            "time", clock.advance, lambda: (self.conditions.timestep, self._kept("clock", clock.new_clock))
        )

    def _rows_for(self, planned: PlannedSite) -> fx.Node:
        """int64 [batch] or [1]: which of a table's plans a call reads."""
        spec = planned.spec
        if spec is None or spec.stages.number == 1:
            return self._regime_for(planned.video.shape[0])
        at = self.stage(spec.stages)
        if spec.number_of_regimes == 1:
            return at
        regime = self._regime_for(planned.video.shape[0])
        return self._once(f"{regime} {at}", stage.row_of, lambda: (regime, at, spec.stages.number))

    def stage(self, stages: Stages) -> fx.Node:
        """Node of int64 [1]: the stage of this step."""
        arguments = (stages.number, stages.starts, stages.by, stages.falling)
        return self._once(f"stage {stages}", stage.stage_of, lambda: (self.clock(), *arguments))

    def _regime_for(self, batch: int) -> fx.Node:
        """int64 [batch] or [1]; one for all where the prompts are another batch than the queries."""
        if self.control.has_regimes:
            kept = self._kept("regimes", regimes.new_regimes, beside=True)
            return self._once(f"regimes of {batch}", torch.narrow, lambda: (kept, 0, 0, batch))
        if self.prompts in (1, batch):
            return self._regimes()
        return self._once("safest", safest, lambda: (self._regimes(),))

    def _regimes(self) -> fx.Node:
        conditions = self.conditions
        mask = conditions.mask if self.control.masked else None
        routed = self._once("routed", route, lambda: (conditions.prompt, mask, *self._router()))
        if not self.latches:
            return routed
        return self._once(
            "latched",
            regimes.latch,
            lambda: (routed, self.clock(), self._kept("regimes", regimes.new_regimes)),
        )

    def _router(self) -> list[fx.Node]:
        assert self.control.router is not None
        return [buffer_node(self.gm, "router", tensor.to(self.device)) for tensor in self.control.router]

    def _kept(self, name: str, make: Callable[[torch.device], torch.Tensor], beside: bool = False) -> fx.Node:
        """Node of a tensor that is kept from call to call, by the graph's own state or beside it."""
        if name not in self.made:
            slot = Slot(name, functools.partial(make, self.device), "call" if beside else "generation")
            self.made[name] = state_node(self.gm, self.context, slot)
        return self.made[name]

    def _once(self, name: str, function: Any, arguments: Callable[[], tuple[Any, ...]]) -> fx.Node:
        if name not in self.made:
            with self.graph.inserting_before(self.begin):
                self.made[name] = self.graph.call_function(function, arguments())
        return self.made[name]
