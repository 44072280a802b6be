"""Small helpers on FX graphs: example values, hints of symbolic sizes, arguments of an attention call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def value_of(node: fx.Node) -> Any:
    """What the node yields: Dynamo's `example_value`, or an exported program's `val`."""
    return node.meta.get("example_value", node.meta.get("val"))


def hint(size: Any) -> int | None:
    """A size as an int without adding a guard; None where it is data-dependent."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    if node is None or not node.has_hint():
        return None
    return int(node.hint)


def shape_hint(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor as ints, without guards; None where it has none or is data-dependent."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return None
    sizes = tuple(hint(size) for size in value.shape)
    return None if None in sizes else sizes  # type: ignore[return-value]


def specialise(size: Any) -> int:
    """A size as an int; on a symbolic size this adds a guard, so another value recompiles."""
    return int(size)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that made the node, '' where the graph doesn't say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for noise in ("L['self']", "L['fn']", ".__dict__", "._orig_mod"):
        path = path.replace(noise, "")
    path = path.replace("['_modules']", "").replace("._modules", "")
    for old, new in (("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    return path.strip(".")
