"""Subgraphs that hide attention: checkpointed layers and nested compile regions are opened for the passes.

Before:  %hop = tag_activation_checkpoint(%wrap_body_0, %x, %weight, ...)     (torch.utils.checkpoint)
         %hop = invoke_subgraph(%subgraph_0, "subgraph_0", %x, %weight, ...)  (torch.compiler.nested_compile_region)
         %y = getitem(%hop, 0)
Open:    the nodes of the body between two markers, so that the passes see one flat graph
After:   a subgraph in which no pass changed anything is as it was; a checkpoint of a graph that will be
         differentiated is wrapped again, so that it still saves memory; any other stays open

Weights, plans and other tensors go into a new body as inputs, as Dynamo does it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import value_of

CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")
_FIRST_OPERAND = {**dict.fromkeys(CHECKPOINTS, 1), "invoke_subgraph": 2}


def region_begins(*operands: Any) -> None:
    """Marker in front of an opened subgraph."""


def region_ends(*outputs: Any) -> None:
    """Marker behind an opened subgraph."""


@dataclass
class Region:
    """An opened subgraph.

    call        the node that called it, no longer in the graph
    body        name of its graph module
    begin, end  its markers, with the operands and the outputs
    nodes       (node, its arguments) as they were put between the markers
    is_tuple    whether it returned a tuple
    """

    call: fx.Node
    body: str
    begin: fx.Node
    end: fx.Node
    nodes: list[tuple[fx.Node, Any]]
    is_tuple: bool

    @property
    def is_checkpoint(self) -> bool:
        """Whether it saves memory to keep it together."""
        return higher_order_name(self.call) in CHECKPOINTS

    def inside(self) -> list[fx.Node]:
        """The nodes between its markers now."""
        found, node = [], self.begin.next
        while node is not self.end:
            found.append(node)
            node = node.next
        return found

    def changed(self) -> bool:
        """Whether a pass changed anything in it."""
        return [(node, (node.args, node.kwargs)) for node in self.inside()] != self.nodes


def open_regions(gm: fx.GraphModule) -> list[Region]:
    """Put the bodies of checkpoints and nested regions in place of their calls; returns them, inner ones first."""
    return [region for node in list(gm.graph.nodes) for region in _open(gm, node)]


def close_regions(gm: fx.GraphModule, regions: list[Region], training: bool) -> None:
    """Restore what no pass changed, wrap changed checkpoints if `training`, remove the markers."""
    restored: set[fx.Node] = set()
    left = []
    for region in reversed(regions):  # outer ones first: with them the inner ones are restored
        if region.begin in restored:
            continue
        if region.changed():
            left.append(region)
        else:
            restored.update(region.inside())
            _wrap(gm, region, gm.graph.create_node("get_attr", region.body), region.begin.args, region.end.args)
    for region in reversed(left):
        if training and region.is_checkpoint:
            _wrap_changed(gm, region)
        else:
            gm.graph.erase_node(region.end)
            gm.graph.erase_node(region.begin)


def higher_order_name(node: fx.Node) -> str:
    """Name of a higher-order operator; '' for any other node."""
    target: Any = node.target
    return str(target.name()) if isinstance(target, torch._ops.HigherOrderOperator) else ""


def nested_graphs(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """Graph modules that a higher-order operator is called with."""
    if not higher_order_name(node):
        return []
    inputs = [n for n in node.all_input_nodes if n.op == "get_attr"]
    found = [_attribute(gm, str(n.target)) for n in inputs]
    return [module for module in found if isinstance(module, fx.GraphModule)]


def _open(gm: fx.GraphModule, node: fx.Node) -> list[Region]:
    """Open one call and the calls inside it; [] where it is none, or one of an unknown form."""
    first = _FIRST_OPERAND.get(higher_order_name(node))
    if first is None or not isinstance(node.args[0], fx.Node) or not nested_graphs(gm, node):
        return []
    get_body, body = node.args[0], str(node.args[0].target)
    module = _attribute(gm, body)
    (returned,) = module.graph.output_node().args
    is_tuple = isinstance(returned, (tuple, list))
    outputs = tuple(returned) if is_tuple else (returned,)
    placeholders = module.graph.find_nodes(op="placeholder")
    attributes = [_attribute(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")]
    if (
        len(placeholders) != len(node.args) - first
        or any(not isinstance(value, torch.nn.Module) for value in attributes)
        or any(not isinstance(out, fx.Node) for out in outputs)
        or (is_tuple and any(user.target is not operator.getitem for user in node.users))
    ):
        return []
    graph = gm.graph
    copies: dict[fx.Node, Any] = dict(zip(placeholders, node.args[first:], strict=True))
    with graph.inserting_before(node):
        begin = graph.call_function(region_begins, tuple(node.args[first:]))
        for inner in module.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
                if inner.op == "get_attr":
                    copies[inner].target = _add_module(gm, _attribute(module, str(inner.target)))
        end = graph.call_function(region_ends, tuple(copies[out] for out in outputs))
    for user in list(node.users) if is_tuple else [node]:
        user.replace_all_uses_with(copies[outputs[user.args[1] if is_tuple else 0]])
        if user is not node:
            graph.erase_node(user)
    graph.erase_node(node)
    if not get_body.users:
        graph.erase_node(get_body)
    region = Region(node, body, begin, end, [], is_tuple)
    inner_regions = [found for copy in region.inside() for found in _open(gm, copy)]
    region.nodes = [(n, (n.args, n.kwargs)) for n in region.inside()]
    return [*inner_regions, region]


def _wrap_changed(gm: fx.GraphModule, region: Region) -> None:
    """Put the nodes of a region into a new body, and what they need and give into its inputs and outputs."""
    inside, original = set(region.inside()), {node for node, _ in region.nodes}
    for node in region.inside():
        is_module = node.op == "get_attr" and isinstance(_attribute(gm, str(node.target)), torch.nn.Module)
        if node not in original and not is_module and inside.isdisjoint(node.all_input_nodes):
            region.begin.prepend(node)  # plans and their gates: shared between layers, never computed again
            inside.remove(node)
    nodes = region.inside()
    outputs = [n for n in nodes if any(user not in inside and user is not region.end for user in n.users)]
    operands = list(dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in inside))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        copies[operand] = graph.placeholder(operand.name)
        copies[operand].meta = dict(operand.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[out] for out in outputs))
    module = fx.GraphModule(gm, graph)
    module.meta = dict(_attribute(gm, region.body).meta)
    region.end.args = tuple(outputs)
    region.is_tuple = True
    _wrap(gm, region, gm.graph.create_node("get_attr", _add_module(gm, module)), tuple(operands), tuple(outputs))


def _wrap(
    gm: fx.GraphModule, region: Region, body: fx.Node, operands: tuple[Any, ...], outputs: tuple[Any, ...]
) -> None:
    """Put a call of `body` in place of the nodes of a region."""
    graph, call = gm.graph, region.call
    region.end.append(body)
    with graph.inserting_after(body):
        leading = call.args[1 : _FIRST_OPERAND[higher_order_name(call)]]
        new = graph.call_function(call.target, (body, *leading, *operands), dict(call.kwargs))
    values = tuple(value_of(out) for out in outputs)
    new.meta = {**call.meta, "example_value": values if region.is_tuple else values[0]}
    inside = {region.begin, region.end, *region.inside()}
    after = new
    for i, out in enumerate(outputs):
        if out not in inside:  # an operand that is handed through
            continue
        if region.is_tuple:
            with graph.inserting_after(after):
                after = graph.call_function(operator.getitem, (new, i))
            after.meta = dict(out.meta)
        out.replace_all_uses_with(after, delete_user_cb=lambda user: user not in inside)
    for node in (region.end, *reversed(region.inside()), region.begin):
        graph.erase_node(node)


def _attribute(module: torch.nn.Module, name: str) -> Any:
    value: Any = module
    for piece in name.split("."):
        value = getattr(value, piece)
    return value


def _add_module(gm: fx.GraphModule, module: torch.nn.Module) -> str:
    """Name of a module, added if the graph module does not have it yet."""
    for name, known in gm.named_children():
        if known is module:
            return name
    name = f"_dynamicrad_body_{sum(name.startswith('_dynamicrad_body') for name, _ in gm.named_children())}"
    gm.add_submodule(name, module)
    return name
