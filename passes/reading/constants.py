"""Small tensors of integers that a graph makes of numbers alone, such as the starts of packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from ..operators.names import op_name, tensor_value
from .writes import is_rewritten

MAX_ELEMENTS = 4096
_FOLLOWED = {
    "tensor", "arange", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like",
    "full_like", "new_tensor", "cat", "stack", "repeat", "expand", "reshape", "view", "unsqueeze", "squeeze", "getitem",
    "pad", "repeat_interleave", "cast", "same", "clone", "int", "long", "cumsum", "add", "sub", "mul",
}  # fmt: skip


class _UnknownError(Exception):
    """A value that depends on more than numbers."""


def integers(node: Any) -> list[int] | None:
    """Values of a one-dimensional tensor of integers that depends on no input; None for anything else."""
    try:
        with _disable_current_modes():
            value = _value(node)
            plain = isinstance(value, torch.Tensor) and value.dim() == 1 and not value.is_floating_point()
            return [int(x) for x in value.tolist()] if plain else None
    except _UnknownError:
        return None


def _value(given: Any) -> Any:
    """A value, computed on the CPU where it is a node's. Raises _UnknownError."""
    if isinstance(given, (list, tuple)):
        return type(given)(_value(x) for x in given)
    if isinstance(given, torch.device):
        return torch.device("cpu")
    if isinstance(given, (int, float, slice, torch.dtype, type(None), str)) and not isinstance(given, torch.SymInt):
        return given
    made = tensor_value(given)
    if made is None or op_name(given) not in _FOLLOWED or is_rewritten(given):
        raise _UnknownError
    if any(not isinstance(n, int) for n in made.shape) or made.numel() > MAX_ELEMENTS:
        raise _UnknownError
    return _run(given)


def _run(node: fx.Node) -> Any:
    args, kwargs = _value(node.args), {name: _value(x) for name, x in node.kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    if any(isinstance(x, str) for x in args[1:]):  # `x.to("cuda")`
        args = tuple(torch.device("cpu") if isinstance(x, str) else x for x in args)
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
        raise _UnknownError from None
