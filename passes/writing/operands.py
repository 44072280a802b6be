"""Nodes around the op: operands [B, H, S, D] of one dtype from a call's own, and its output back again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dynamicrad_compile.plans.order import reorder, reordered

from ..operators.names import op_name, tensor_value
from ..reading.layout import from_plain, output_value, to_plain
from ..reading.multihead_attention import project_inputs, project_output
from ..site import AttentionCall, Site


def plain_operands(graph: fx.Graph, call: AttentionCall) -> list[fx.Node]:
    """Nodes of query, key and value as the op takes them."""
    given = (call.query, call.key, call.value)
    if call.projections is not None:
        return project_inputs(graph, call, given)
    nodes = []
    for node, layout in zip(given, call.layouts, strict=False):
        value = tensor_value(node)
        if call.dtype is not None and value is not None and value.dtype != call.dtype:
            node = graph.call_function(torch.ops.aten.to.dtype, (node, call.dtype))
        nodes.append(to_plain(graph, node, layout, call.sequences))
    return nodes


def into_order(graph: fx.Graph, x: fx.Node, order: fx.Node | None, inverse: fx.Node | None, training: bool) -> fx.Node:
    """Node of x [B, H, S, D] with its tokens in another order, int64 [1 or B, S] or None; inverse: the way back."""
    if order is None:
        return x
    if training:
        return graph.call_function(reorder, (x, order, inverse))
    return graph.call_function(reordered, (x, order))


def original_output(graph: fx.Graph, site: Site, out: fx.Node) -> fx.Node:
    """Node of the attention's output as the original had it: layout, memory order, dtype."""
    call, value = site.call, output_value(site.node, site.call)
    if call.projections is not None:
        return project_output(graph, call, out)
    like = value if isinstance(value, torch.Tensor) else None
    out = from_plain(graph, out, call.layouts[3], like)
    if like is not None and call.dtype is not None and like.dtype != call.dtype:
        out = graph.call_function(torch.ops.aten.to.dtype, (out, like.dtype))
    return out


def take_over(graph: fx.Graph, site: Site, out: fx.Node, sites: list[Site]) -> None:
    """Let `out` take the place of a site's output, and remove the nodes that only the site needed."""
    node, output = site.node, site.call.output
    olds = [node] if output is None else [user for user in node.users if user.args[1] == output]
    for old in olds:
        out.meta = {**old.meta, **{k: v for k, v in out.meta.items() if v}}
        old.replace_all_uses_with(out)
        rename(sites, old, out)
    for dead in (*(user for user in list(node.users) if op_name(user) == "getitem"), node, *reversed(site.call.inner)):
        if not dead.users:
            graph.erase_node(dead)


def rename(sites: Sequence[Site], old: fx.Node, new: fx.Node) -> None:
    """Let the calls of sites read another node."""
    for site in sites:
        site.call = _renamed(site.call, old, new)


def _renamed(call: AttentionCall, old: fx.Node, new: fx.Node) -> AttentionCall:
    changes: dict[str, Any] = {name: new for name in ("query", "key", "value", "mask") if getattr(call, name) is old}
    return dataclasses.replace(call, **changes) if changes else call


def copy_origin(start: fx.Node, stop: fx.Node) -> None:
    """Give the new nodes between two others the module path and the source line of the second."""
    node = start.next
    while node is not stop:
        for name in ("nn_module_stack", "stack_trace"):
            if stop.meta.get(name):
                node.meta.setdefault(name, stop.meta[name])
        node = node.next
