"""Replace planned attentions by the block-sparse op.

Before:  %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)
After:   %counts, %indices = get_attr                                 (shared by sites with the same plan)
         %keys = %m[:, 0, 0]                                          (only with a key padding mask)
         %q, %k, %v in the layout [B, H, S, D]                        (see _layout)
         %pair = dynamicrad.block_sparse_attention(%q, %k, %v, %counts, %indices, scale, block_q, block_kv, %keys)
         %out = %pair[0], in the layout and the memory order that the original had

In a graph with symbolic sizes the plan is made when the graph runs, from the sizes that it then has:

         %f, %h, %w, %s = sym_size of nodes that hold these axes
         %counts, %indices = dynamicrad.make_plan(%q, %f, %h, %w, text_before, %s, spec)

Where the grid was read from the values of a position table, the plan holds only while the table shows that grid
(see _table_plan). Where an axis is in no shape of a graph with symbolic sizes, those sizes become constants: another
resolution compiles again. Whatever the case, no graph uses a plan that was made for a different grid.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dynamicrad_compile.kernels import attention_op as _registers_the_ops  # noqa: F401
from dynamicrad_compile.kernels import moments_op as second_order
from dynamicrad_compile.plans import op as _registers_make_plan  # noqa: F401
from dynamicrad_compile.runtime.account import record

from .graph import value_of
from .reading.layout import token_dim
from .reading.masks import keys_node, without_hidden_rows
from .site import PassContext, Site
from .writing.buffers import buffer_node
from .writing.control import Controls, PlanNodes
from .writing.operands import copy_origin, original_output, plain_operands, take_over
from .writing.selection import select
from .writing.sizes import Home, RuntimeSizes, make_constant, runtime_sizes, symbolic_inputs
from .writing.table_plan import grids_of, guarded_plan, table_of


def replace_attention(gm: fx.GraphModule, context: PassContext) -> int:
    """Rewrite the graph; returns the number of replaced sites."""
    planned = [site for site in context.sites if site.plan is not None]
    if not planned:
        return 0
    sizes = symbolic_inputs(gm, context)
    homes = {site.node: runtime_sizes(site, context, fixed_inputs=not sizes) for site in planned}
    symbolic = bool(sizes) and all(homes[site.node] for site in planned)
    if sizes and not symbolic:
        if context.is_final:
            for site in planned:
                names = ", ".join(sorted({str(size) for size in sizes}))
                site.plan, site.reason = None, f"sizes {names} are dynamic, and an axis of its grid is in no shape"
            return 0
        make_constant(sizes)
    if symbolic:
        context.notes.append("sizes are symbolic: plans are made when the graph runs, one for each grid it meets")
    device = value_of(planned[0].call.query).device
    controls = Controls(gm, context, device)
    plans: dict[Any, PlanNodes] = {}
    stats: dict[Any, torch.Tensor] = {}
    for site in planned:
        where = homes[site.node] if symbolic or site.data_dependent else None
        table = table_of(site)
        if site.data_dependent and where is None:
            site.reason = "its length depends on data, and an axis of its grid is in no shape of the graph"
            continue
        assert site.plan is not None
        assert site.q_shape is not None
        made = (site.plan_spec, site.grid_axes, site.text, _length(site)) if where else id(site.plan)
        key = (made, site.q_shape[0])
        num_kv = None if where else site.plan.plan.num_kv_blocks
        constant = functools.partial(_constant_plan, gm, device)
        if key not in plans:
            with gm.graph.inserting_before(site.node):
                if where:
                    nodes = _runtime_plan(gm, site, where)
                elif table:
                    nodes = guarded_plan(gm, site, table, constant)
                else:
                    nodes = constant(site.plan.tensors())
                plans[key] = controls.choose(nodes, site, num_kv)
                if _varies(site, context) and not site.plan.criteria:
                    stats[key] = _record(gm, plans[key], site, num_kv, device)
        site.stats = stats.get(key)
        _replace(gm, site, context, plans[key], controls, num_kv)
        site.replaced = True
        if table:
            grids = " and ".join("x".join(map(str, grid)) for grid in grids_of(site))
            context.notes.append(
                f"the grid was read from the values of {table.node.name} and is looked up at each call: "
                f"{grids} run sparse, other grids of as many tokens run dense"
            )
    if context.covariance and not any(site.overhead for site in planned):
        context.notes.append("option covariance does nothing here: no plan compensates (compensate is 0)")
    return sum(site.replaced for site in planned)


def _varies(site: Site, context: PassContext) -> bool:
    """Whether what is skipped is known only when the graph runs; an exported program keeps no account of it."""
    assert site.plan is not None
    several = len(site.plan.plan.kv_counts) > 1
    return not context.is_final and bool(several or context.control.gates or site.plan.criteria)


def _record(gm: fx.GraphModule, nodes: PlanNodes, site: Site, num_kv: int | None, device: torch.device) -> torch.Tensor:
    """Add up, whenever the graph runs, what share of dense attention it computes; the sums are returned."""
    assert site.plan is not None
    stats = torch.zeros(2, dtype=torch.float64, device=device)
    arguments = (buffer_node(gm, "stats", stats), nodes.counts, nodes.compensate, nodes.indices, num_kv)
    gm.graph.call_function(record, (*arguments, site.plan.plan.block_kv))
    return stats


def _length(site: Site) -> str:
    """The symbolic length of the query's sequence, as text."""
    return str(value_of(site.call.query).shape[token_dim(site.call)])


def _runtime_plan(gm: fx.GraphModule, site: Site, where: RuntimeSizes) -> PlanNodes:
    """Nodes of a plan table made from the sizes that the graph has when it runs."""
    graph = gm.graph

    def size(home: Home) -> Any:
        return home if isinstance(home, int) else graph.call_function(torch.ops.aten.sym_size.int, home)

    def product(homes: Sequence[Home]) -> Any:
        return functools.reduce(lambda a, b: graph.call_function(operator.mul, (a, b)), map(size, homes))

    query = site.call.query
    frames, height, width = map(size, where.grid)
    length = size((query, token_dim(site.call)))
    before: Any = 0
    if where.before is None:
        before = graph.call_function(operator.sub, (length, product(where.grid)))
    for piece in where.before or ():
        before = graph.call_function(operator.add, (before, product(piece)))
    table = graph.call_function(
        torch.ops.dynamicrad.make_plan.default, (query, frames, height, width, before, length, site.plan_spec)
    )
    assert site.plan is not None
    return PlanNodes(*(graph.call_function(operator.getitem, (table, i)) for i in range(len(site.plan.tensors()))))


def _constant_plan(gm: fx.GraphModule, device: torch.device, tensors: tuple[torch.Tensor, ...]) -> PlanNodes:
    """Nodes of a plan table as buffers of the graph module."""
    names = ("counts", "indices", "forced", "near", "thresholds")
    return PlanNodes(*(buffer_node(gm, f"plan_{name}", t.to(device)) for name, t in zip(names, tensors, strict=False)))


def _replace(
    gm: fx.GraphModule, site: Site, context: PassContext, nodes: PlanNodes, controls: Controls, num_kv: int | None
) -> None:
    node, call, graph = site.node, site.call, gm.graph
    assert site.plan is not None
    plan = site.plan.plan
    before = node.prev
    with graph.inserting_before(node):
        keys = keys_node(graph, call) if call.mask is not None else None
        scale = None if call.scale is None else float(call.scale)
        operands = plain_operands(graph, call)
        if site.plan.criteria:
            nodes = select(gm, site, operands, keys, nodes, controls, num_kv)
            if _varies(site, context):
                site.stats = _record(gm, nodes, site, num_kv, controls.device)
        arguments = (*operands, nodes.counts, nodes.indices, scale, plan.block_q, plan.block_kv, keys)
        if nodes.compensate is not None:
            arguments = (*arguments, 0, nodes.compensate)
        options = {"qk_int8": True} if context.qk_int8 else {}
        op = torch.ops.dynamicrad.block_sparse_attention.default
        if context.covariance and nodes.compensate is not None:
            op = torch.ops.dynamicrad.second_order_attention.default
            assert site.q_shape is not None
            site.overhead = second_order.share_of_dense(site.q_shape[-1], plan.kv_len, plan.block_q, plan.block_kv)
        pair = graph.call_function(op, arguments, options)
        out = graph.call_function(operator.getitem, (pair, 0))
        if keys is not None:
            out = without_hidden_rows(graph, call, out, keys)
        out = original_output(graph, site, out)
    copy_origin(before, node)
    take_over(graph, site, out, context.sites)
