"""Read what a node does, whatever its spelling: `a @ b`, `torch.matmul(a, b)`, `a.matmul(b)` and the ATen
operator of an exported program are all "matmul".

Also here: numbers that a graph computes from numbers alone, and which nodes write in place.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..graph import value_of

_ALIASES = {
    **dict.fromkeys(("__matmul__", "__rmatmul__"), "matmul"),
    **dict.fromkeys(("imul", "multiply", "__mul__", "__rmul__", "__imul__"), "mul"),
    **dict.fromkeys(("truediv", "itruediv", "true_divide", "divide", "__truediv__", "__itruediv__"), "div"),
    **dict.fromkeys(("iadd", "__add__", "__radd__", "__iadd__"), "add"),
    **dict.fromkeys(("isub", "subtract", "__sub__", "__isub__"), "sub"),
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    **dict.fromkeys(("_safe_softmax", "_softmax"), "softmax"),
    **dict.fromkeys(("invert", "bitwise_not", "__invert__"), "logical_not"),
    **dict.fromkeys(("to", "type_as", "type", "float", "half", "bfloat16", "double", "_to_copy"), "cast"),
    **dict.fromkeys(("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "positive"), "same"),
    **dict.fromkeys(("_unsafe_view", "unflatten", "flatten"), "reshape"),
    **dict.fromkeys(("view", "expand_as", "broadcast_to"), "view"),
}  # fmt: skip

VIEWS = {
    "view", "reshape", "transpose", "permute", "t", "mT", "unsqueeze", "squeeze", "expand", "getitem", "slice",
    "select", "narrow", "chunk", "split", "unbind", "alias", "detach", "same", "view_as", "movedim", "cast",
}  # fmt: skip


def op_name(node: Any) -> str:
    """Canonical name of the PyTorch operation that a node performs; '' for anything else."""
    if not isinstance(node, fx.Node):
        return ""
    name = _raw_name(node)
    if not name.startswith("__"):
        name = name.rstrip("_")
    return "mT" if name == "getattr" and node.args[1] in ("mT", "mH") else _ALIASES.get(name, name)


def _raw_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    qualified = operator_name(target)
    if qualified:
        namespace, _, name = qualified.partition("::")
        return name if namespace == "aten" else ""
    name = getattr(target, "__name__", "")
    if target is getattr:
        return "getattr"
    spaces = (operator, torch, F, torch._C._nn, torch.Tensor)
    return name if any(getattr(space, name, None) is target for space in spaces) else ""


def operator_name(target: Any) -> str:
    """`namespace::name` of a registered operator; '' for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    return str(target._qualified_op_name) if isinstance(target, torch._ops.OpOverloadPacket) else ""


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def operand(node: fx.Node) -> Any:
    """The tensor that an operation works on: its first argument."""
    return argument(node, 0, "input", node.kwargs.get("self"))


def permutation(node: fx.Node, rank: int) -> list[int] | None:
    """Order in which a transposing node takes the dimensions of its input; None for any other node."""
    name, order = op_name(node), list(range(rank))
    if name == "permute":
        given: Any = node.args[1] if len(node.args) == 2 else node.args[1:] or node.kwargs.get("dims")
        return [d % rank for d in given]
    if name == "transpose":
        a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    elif name == "mT" or (name == "t" and rank == 2):
        a, b = -2, -1
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return order


def tensor_value(node: Any) -> torch.Tensor | None:
    """The recorded tensor of a node; None for anything else."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


_FUNCTIONS: dict[str, Callable[..., float]] = {"sqrt": math.sqrt, "rsqrt": lambda x: x**-0.5, "pow": pow}
_FILLS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}


def number(value: Any, by: fx.Node | None = None) -> float | None:
    """A constant: a Python number, or a tensor that the graph fills with or computes from such numbers.

    `by` is the node that uses it, and may write over it.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    name = op_name(value)
    if not name or is_rewritten(value, by):
        return None
    if name in _FILLS:
        return _FILLS[name]
    if name in ("full", "full_like", "new_full"):
        return number(argument(value, 2 if name == "new_full" else 1, "fill_value"))
    if name == "cast" and not getattr(tensor_value(value), "is_floating_point", bool)():
        return None
    if name in ("cast", "same", "tensor", "scalar_tensor"):
        return number(operand(value))
    if name in _FUNCTIONS:
        numbers = [number(x) for x in value.args]
        if None not in numbers:
            return float(_FUNCTIONS[name](*numbers))
    return None


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
        if (is_mutating(user) and _may_write_to(user, node)) or (op_name(user) in VIEWS and is_rewritten(user)):
            return True
    return False


def _may_write_to(user: fx.Node, node: fx.Node) -> bool:
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


_NEW = {f"{kind}{like}" for kind in ("zeros", "ones", "empty", "full") for like in ("", "_like")} | {
    "new_zeros", "new_ones", "new_empty", "new_full", "clone",
}  # fmt: skip


def buffer_of(tensor: Any) -> fx.Node | None:
    """The node that made the memory that a tensor is in; None where that is not plain."""
    while isinstance(tensor, fx.Node) and _raw_name(tensor).rstrip("_") not in _NEW:
        if not (op_name(tensor) in VIEWS or is_mutating(tensor)):
            return None
        tensor = operand(tensor)
    return tensor if isinstance(tensor, fx.Node) else None
