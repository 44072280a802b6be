"""What writes in place: which nodes do, whether a tensor is written over, and whose memory that is."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from ..operators.names import operand
from ..operators.table import operator_of


def is_mutating(node: fx.Node) -> bool:
    """Whether a node may write over one of its inputs."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return node.op == "call_module" and "_guards_fn" not in str(node.target)
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    if getattr(target, "__module__", "") == "_operator":  # and_ and or_ end like methods that write in place
        return target in _IN_PLACE
    name = getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


_IN_PLACE = {
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ifloordiv, operator.imatmul,
}  # fmt: skip


def is_rewritten(node: fx.Node, but_by: fx.Node | None = None) -> bool:
    """Whether something writes over a node's tensor, or over a view of it, `but_by` apart."""
    for user in node.users:
        if user is but_by:
            continue
        if (is_mutating(user) and may_write_to(user, node)) or (operator_of(user).view and is_rewritten(user)):
            return True
    return False


def may_write_to(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node that writes in place may write over another one's tensor."""
    target: Any = user.target
    if isinstance(target, torch._ops.OpOverload):
        read_only = [a.name for a in target._schema.arguments if a.alias_info is None or not a.alias_info.is_write]
        names = [a.name for a in target._schema.arguments]
        given = dict(zip(names, user.args, strict=False)) | dict(user.kwargs)
        return any(value is node and name not in read_only for name, value in given.items())
    return operand(user) is node or user.kwargs.get("out") is node


class Positions:
    """Order of a graph's nodes, to tell whether anything is written in place between two of them."""

    def __init__(self, graph: fx.Graph):
        self.of = {node: i for i, node in enumerate(graph.nodes)}

    @functools.cached_property
    def writes(self) -> list[fx.Node]:
        """Nodes that may write in place, in order."""
        return [node for node in self.of if is_mutating(node)]

    def write_between(
        self, first: fx.Node, last: fx.Node, but: tuple[fx.Node, ...] = (), mask: fx.Node | None = None
    ) -> fx.Node | None:
        """A node after `first` and before `last` that may write over something older, or over `mask`; else None."""
        guarded = buffer_of(mask)
        for node in self.writes:
            if self.of[first] < self.of[node] < self.of[last] and node not in but:
                buffer = buffer_of(operand(node))
                if buffer is None or buffer is guarded or self.of[buffer] < self.of[first]:
                    return node
        return None


def buffer_of(tensor: Any) -> fx.Node | None:
    """The node that made the memory that a tensor is in; None where that is not plain."""
    while isinstance(tensor, fx.Node) and not operator_of(tensor).new:
        if not (operator_of(tensor).view or is_mutating(tensor)):
            return None
        tensor = operand(tensor)
    return tensor if isinstance(tensor, fx.Node) else None
