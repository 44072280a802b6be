"""Nodes of plan tables: buffers of the graph, or made when the graph runs from the sizes that it then has."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dynamicrad_compile.plans import positions_op as _registers_the_ops  # noqa: F401
from dynamicrad_compile.plans.op import NAMES
from dynamicrad_compile.runtime.account import new_stats, record
from dynamicrad_compile.runtime.pool import Slot

from ..axes.positions import PositionTable, table_of
from ..context import PassContext
from ..graph import value_of
from ..reading.layout import operands_of, token_dim
from ..site import PlannedSite, VideoSite
from .buffers import buffer_node, state_node
from .control import Controls, PlanNodes
from .sizes import Formula, Home, RuntimeSizes
from .table_plan import guarded_plan


@dataclass(frozen=True)
class WrittenPlan:
    """A plan in the graph.

    num_kv  number of kv blocks; None where it is symbolic
    stats   name of the slot that adds up what its calls compute, where that varies and no selection follows
    """

    nodes: PlanNodes
    num_kv: int | None
    stats: str


class PlanWriter:
    """Writes the plans of one graph, each once for all sites that share it.

    homes  where the graph holds the sizes of the sites whose plans are made when it runs
    """

    def __init__(
        self, gm: fx.GraphModule, context: PassContext, controls: Controls, homes: Mapping[fx.Node, RuntimeSizes]
    ):
        self.gm, self.controls, self.homes = gm, controls, homes
        self.is_final, self.gates = context.is_final, context.decisions.control.gates
        self.written: dict[Any, WrittenPlan] = {}

    def write(self, planned: PlannedSite) -> WrittenPlan:
        """The plan of a site, in front of it unless a site before it has the same."""
        video, table = planned.video, planned.table
        where = self.homes.get(video.node)
        made = (planned.spec, video.axes, video.text, video.queries, *_lengths(video)) if where else id(table)
        key = (made, video.shape[0])
        if key not in self.written:
            num_kv = None if where else table.plan.num_kv_blocks
            with self.gm.graph.inserting_before(video.node):
                nodes = self.controls.choose(self._nodes(planned, where), planned, num_kv)
                chosen = table.criteria or table.searches  # counted once it is known what was
                counted = (self.varies(planned) or (where and not self.is_final)) and not chosen
                stats = self.record(nodes, planned, num_kv) if counted else ""
            self.written[key] = WrittenPlan(nodes, num_kv, stats)
        return self.written[key]

    def varies(self, planned: PlannedSite) -> bool:
        """Whether what is skipped is known only when the graph runs; an exported program keeps no account of it."""
        several = len(planned.table.plan.kv_counts) > 1
        table = planned.table
        return not self.is_final and bool(several or self.gates or table.criteria or table.searches)

    def record(self, nodes: PlanNodes, planned: PlannedSite, num_kv: int | None) -> str:
        """Add up, whenever the graph runs, what share of dense attention it computes; the sums' slot is returned."""
        slot = Slot("stats", functools.partial(new_stats, self.controls.device), "model")
        sums = state_node(self.gm, self.controls.context, slot)
        arguments = (sums, nodes.counts, nodes.compensate, nodes.indices, num_kv)
        self.gm.graph.call_function(record, (*arguments, planned.table.plan.block_kv, planned.overhead))
        return self.controls.context.slots[-1].name

    def _nodes(self, planned: PlannedSite, where: RuntimeSizes | None) -> PlanNodes:
        table = table_of(planned.video.axes)
        if where is not None:
            return self._runtime(planned, where)
        if table is not None:
            return guarded_plan(self.gm, planned, table, self._constant)
        return self._constant(planned.table.tensors())

    def _constant(self, tensors: Mapping[str, torch.Tensor]) -> PlanNodes:
        """A table as buffers of the graph module."""
        device = self.controls.device
        moved = {id(t): t.to(device) for t in tensors.values()}  # queries may have the order of the keys
        return PlanNodes(**{name: buffer_node(self.gm, f"plan_{name}", moved[id(t)]) for name, t in tensors.items()})

    def _runtime(self, planned: PlannedSite, where: RuntimeSizes) -> PlanNodes:
        """A table made from the sizes that the graph has when it runs."""
        call, video, attention = self.gm.graph.call_function, planned.video, planned.video.call
        query = attention.query

        def size(home: Home) -> Any:
            if isinstance(home, Formula):
                return self._computed(home)
            return call(torch.ops.aten.sym_size.int, home) if isinstance(home, tuple) else home

        def product(homes: Sequence[Home]) -> Any:
            return functools.reduce(lambda a, b: call(operator.mul, (a, b)), map(size, homes))

        table = where.grid if isinstance(where.grid, PositionTable) else None
        grid: Sequence[Home] = where.grid if isinstance(where.grid, tuple) else ((where.grid.node, where.grid.dim),)

        def length_of(which: int) -> Any:
            found = size((operands_of(attention)[which], token_dim(attention, which)))
            packed = "t" in attention.layouts[which]
            return call(operator.floordiv, (found, attention.sequences or 1)) if packed else found

        length = length_of(0 if video.queries is None else 1)
        before: Any = 0
        if where.before is None:
            before = call(operator.sub, (length, product(grid)))
        for piece in where.before or ():
            before = call(operator.add, (before, product(piece)))
        assert planned.spec is not None
        rest = (before, length, planned.spec.to_json())
        asked: tuple[Any, ...] = ()
        if video.queries is not None:
            number = length_of(0)
            at_end = video.queries[1] == video.keys
            asked = (call(operator.sub, (length, number)) if at_end else before, number)
        if table is not None:
            made = call(torch.ops.dynamicrad.plan_of_positions.default, (query, table.node, table.dim, *rest, *asked))
        else:
            made = call(torch.ops.dynamicrad.make_plan.default, (query, *map(size, grid), *rest, *asked))
        names = planned.table.tensors()
        nodes = {name: call(operator.getitem, (made, NAMES.index(name))) for name in names if not name.startswith("q_")}
        if "order" in nodes and not asked:
            return PlanNodes(**nodes, q_order=nodes["order"], q_inverse=nodes["inverse"])
        if "order" in nodes:  # the op has one for queries of any range
            own = {name: call(operator.getitem, (made, NAMES.index(name))) for name in ("q_order", "q_inverse")}
            return PlanNodes(**nodes, **own)
        return PlanNodes(**nodes)

    def _computed(self, formula: Formula) -> Any:
        """A size computed from others, by Python's own operators."""
        from torch.utils._sympy.interp import sympy_interp  # loads SymPy, which importing the package does not
        from torch.utils._sympy.reference import PythonReferenceAnalysis

        tracer = fx.proxy.GraphAppendingTracer(self.gm.graph)
        proxies = {}
        for symbol in formula.expression.free_symbols:
            home = formula.symbols[symbol]
            if not isinstance(home, fx.Node):
                home = self.gm.graph.call_function(torch.ops.aten.sym_size.int, home)
            proxies[symbol] = fx.Proxy(home, tracer)
        value = sympy_interp(PythonReferenceAnalysis, proxies, formula.expression)
        return value.node if isinstance(value, fx.Proxy) else value


def _lengths(video: VideoSite) -> tuple[str, str]:
    """The symbolic lengths of the queries and keys, as text."""
    query, key, _ = (value_of(node).shape for node in operands_of(video.call))
    return str(query[token_dim(video.call)]), str(key[token_dim(video.call, 1)])
