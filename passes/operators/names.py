"""What an operation is called: one canonical name for all its spellings.

`a @ b`, `torch.matmul(a, b)`, `a.matmul(b)` and the ATen operator of an exported program are all "matmul"; an operation
that writes in place has the name of the one that does not. Operators outside `aten` keep their qualified name.
"""

from __future__ import annotations

import operator
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
    **dict.fromkeys(("and", "iand", "bitwise_and", "__and__", "__rand__", "__iand__"), "logical_and"),
    **dict.fromkeys(("invert", "bitwise_not", "__invert__"), "logical_not"),
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    **dict.fromkeys(("_safe_softmax", "_softmax"), "softmax"),
    **dict.fromkeys(("to", "type_as", "type", "float", "half", "bfloat16", "double", "bool", "_to_copy"), "cast"),
    **dict.fromkeys(("contiguous", "detach", "alias", "lift", "lift_fresh", "lift_fresh_copy", "positive"), "same"),
    **dict.fromkeys(
        ("_unsafe_view", "_reshape_alias", "_reshape_copy", "unflatten", "flatten", "ravel", "reshape_as"), "reshape"
    ),
    **dict.fromkeys(("expand_as", "broadcast_to"), "expand"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("mH", "adjoint"), "mT"),
    "view_as": "view",
}


def canonical(name: str) -> str:
    """The one name of an operation of which this is a spelling: the name of a function, method or ATen operator."""
    name = name.removeprefix("aten::")
    if not name.startswith("__"):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def op_name(node: Any) -> str:
    """Canonical name of the operation that a node performs, or of the attribute it reads; '' for anything else."""
    if not isinstance(node, fx.Node):
        return ""
    return canonical(_raw_name(node))


def _raw_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    qualified = operator_name(target)
    if qualified:
        return qualified
    name = getattr(target, "__name__", "")
    if target is getattr:
        return str(node.args[1])
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


def tensor_value(node: Any) -> torch.Tensor | None:
    """The recorded tensor of a node; None for anything else."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None
