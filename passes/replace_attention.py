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
from torch._dynamo.source import ConstantSource

from dynamicrad_compile.kernels import block_sparse_attention as _registers_the_op  # noqa: F401
from dynamicrad_compile.plan import BlockPlan

from ._graph import value_of
from ._layout import token_dim
from ._masks import keys_node, without_hidden_rows
from ._operands import copy_origin, original_output, plain_operands, take_over
from ._site import PassContext, Site
from ._sizes import Home, RuntimeSizes, make_constant, runtime_sizes, symbolic_inputs
from ._table_plan import grids_of, guarded_plan, table_of


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
    plans: dict[Any, tuple[fx.Node, fx.Node]] = {}
    for site in planned:
        where = homes[site.node] if symbolic or site.data_dependent else None
        table = table_of(site)
        constant = functools.partial(_constant_plan, gm, value_of(site.call.query).device)
        if site.data_dependent and where is None:
            site.reason = "its length depends on data, and an axis of its grid is in no shape of the graph"
            continue
        key = (site.plan_spec, site.grid_axes, site.text, _length(site)) if where else id(site.plan)
        assert site.plan is not None
        if key not in plans:
            with gm.graph.inserting_before(site.node):
                if where:
                    plans[key] = _runtime_plan(gm, site, where)
                elif table:
                    plans[key] = guarded_plan(gm, site, table, constant)
                else:
                    plans[key] = constant(site.plan)
        _replace(gm, site, context.sites, *plans[key])
        site.replaced = True
        if table:
            grids = " and ".join("x".join(map(str, grid)) for grid in grids_of(site))
            context.notes.append(
                f"the grid was read from the values of {table.node.name} and is looked up at each call: "
                f"{grids} run sparse, other grids of as many tokens run dense"
            )
    return sum(site.replaced for site in planned)


def _length(site: Site) -> str:
    """The symbolic length of the query's sequence, as text."""
    return str(value_of(site.call.query).shape[token_dim(site.call)])


def _runtime_plan(gm: fx.GraphModule, site: Site, where: RuntimeSizes) -> tuple[fx.Node, fx.Node]:
    """Nodes of counts and indices made from the sizes that the graph has when it runs."""
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
    pair = graph.call_function(
        torch.ops.dynamicrad.make_plan.default, (query, frames, height, width, before, length, site.plan_spec)
    )
    return graph.call_function(operator.getitem, (pair, 0)), graph.call_function(operator.getitem, (pair, 1))


def _constant_plan(gm: fx.GraphModule, device: torch.device, plan: BlockPlan) -> tuple[fx.Node, fx.Node]:
    """Nodes of counts and indices as buffers of the graph module; AOT autograd lifts them to static inputs."""
    sources = getattr(gm, "_param_name_to_source", None)
    name = f"_dynamicrad_plan_{sum(buffer.startswith('_dynamicrad_plan') for buffer, _ in gm.named_buffers()) // 2}"
    for suffix, tensor in (("counts", plan.kv_counts.to(device)), ("indices", plan.kv_indices.to(device))):
        gm.register_buffer(f"{name}_{suffix}", tensor)
        if sources is not None:  # a graph of Dynamo must say where each of its buffers comes from
            sources[f"{name}_{suffix}"] = ConstantSource(source_name=f"{name}_{suffix}")
    return gm.graph.get_attr(f"{name}_counts"), gm.graph.get_attr(f"{name}_indices")


def _replace(gm: fx.GraphModule, site: Site, sites: list[Site], counts: fx.Node, indices: fx.Node) -> None:
    node, plan, call, graph = site.node, site.plan, site.call, gm.graph
    assert plan is not None
    before = node.prev
    with graph.inserting_before(node):
        keys = keys_node(graph, call) if call.mask is not None else None
        scale = None if call.scale is None else float(call.scale)
        arguments = (*plain_operands(graph, call), counts, indices, scale, plan.block_q, plan.block_kv, keys)
        pair = graph.call_function(torch.ops.dynamicrad.block_sparse_attention.default, arguments)
        out = graph.call_function(operator.getitem, (pair, 0))
        if keys is not None:
            out = without_hidden_rows(graph, call, out, keys)
        out = original_output(graph, site, out)
    copy_origin(before, node)
    take_over(graph, site, out, sites)
