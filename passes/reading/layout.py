"""Layouts of attention operands: from whatever a model uses to [batch, heads, tokens, head_dim] and back.

A layout names the dimensions of a tensor, "bshd" say; see AttentionCall. A letter that is missing is a dimension of
size 1 (heads folded into the batch are "bsd"); a "b" that occurs twice is a batch of several dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..axes.labels import Label, resolve, take
from ..graph import hint, shape_hint, value_of
from ..site import AttentionCall

BHSD = "bhsd"


def layout_of_rank(rank: int) -> str:
    """What a tensor of so many dimensions is to scaled_dot_product_attention and to matrix products."""
    return {2: "sd", 3: "bsd"}.get(rank, "b" * (rank - 3) + "hsd")


def plain_shape(call: AttentionCall, which: int) -> tuple[int, int, int, int] | None:
    """Shape [B, H, S, D] of query (0), key (1) or value (2), as hints; None where it is not recorded."""
    node, layout = operands_of(call)[which], call.layouts[which]
    shape = shape_hint(node)
    if shape is None or len(shape) != len(layout):
        return None
    sizes = {letter: math.prod(n for x, n in zip(layout, shape, strict=True) if x == letter) for letter in BHSD}
    if "t" in layout:
        sizes["b"] = call.sequences or 1
        sizes["s"] = shape[layout.index("t")] // sizes["b"]
    if call.projections is not None:
        sizes["h"], sizes["d"] = call.projections.heads, sizes["d"] // call.projections.heads
    return sizes["b"], sizes["h"], sizes["s"], sizes["d"]


def operands_of(call: AttentionCall) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value."""
    return call.query, call.key, call.value


def token_dim(call: AttentionCall, which: int = 0) -> int:
    """The dimension of query (0), key (1) or value (2) that holds its tokens."""
    return call.layouts[which].index("t" if "t" in call.layouts[which] else "s")


def plain_labels(call: AttentionCall, which: int, labels: list[Label]) -> list[Label]:
    """Labels of [B, H, S, D] from those of query (0), key (1) or value (2)."""
    layout = call.layouts[which]
    found: dict[str, Label] = dict.fromkeys(BHSD, ())
    for letter, label in zip(layout, labels, strict=True):
        if letter == "t":
            leaves = list(resolve(label))
            taken = take(leaves, call.sequences or 1)
            found["b"], found["s"] = (taken, tuple(leaves)) if taken is not None else ((), label)
        else:
            found[letter] = (*found[letter], *label)
    return [found[letter] for letter in BHSD]


def output_labels(call: AttentionCall, query: list[Label], value: list[Label]) -> list[Label] | None:
    """Labels of the output in its own layout: positions of the query, features of the value."""
    order = call.layouts[3]
    if any(order.count(x) > 1 for x in BHSD):
        return None
    found: dict[str, Label] = dict(zip(call.layouts[0], query, strict=True))
    features = dict(zip(call.layouts[2], value, strict=True))
    if call.projections is None:
        found["d"] = features["d"]
    else:
        found.pop("d")
    return [found.get(letter, ()) for letter in order]


def to_plain(graph: fx.Graph, node: fx.Node, layout: str, sequences: int | None) -> fx.Node:
    """Nodes that view a tensor as [B, H, S, D]."""
    if "t" in layout:
        at = layout.index("t")
        node = graph.call_function(torch.unflatten, (node, at, (sequences, -1)))
        layout = layout.replace("t", "bs")
    order = [layout.index(letter) for letter in BHSD if letter in layout]
    if order != sorted(order):
        node = graph.call_function(torch.permute, (node, order))
    for d, letter in enumerate(BHSD):
        if letter not in layout:
            node = graph.call_function(torch.unsqueeze, (node, d))
    return node


def from_plain(graph: fx.Graph, node: fx.Node, layout: str, like: torch.Tensor | None) -> fx.Node:
    """Nodes that bring a contiguous [B, H, S, D] into a layout, in the memory order of `like`."""
    target = layout.replace("t", "bs")
    have = BHSD
    for d, letter in reversed(list(enumerate(BHSD))):
        if letter not in target:
            node = graph.call_function(torch.squeeze, (node, d))
            have = have.replace(letter, "")
    memory = target
    if like is not None and like.dim() == len(target):
        memory = "".join(target[d] for d in memory_order(like))
    if memory != have:
        node = graph.call_function(torch.permute, (node, [have.index(letter) for letter in memory]))
        node = graph.call_function(torch.ops.aten.contiguous.default, (node,))
    if target != memory:
        node = graph.call_function(torch.permute, (node, [memory.index(letter) for letter in target]))
    if "t" in layout:
        at = layout.index("t")
        node = graph.call_function(torch.flatten, (node, at, at + 1))
    return node


def memory_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest."""
    strides = [hint(s) for s in value.stride()]
    return sorted(range(value.dim()), key=lambda d: -strides[d])


def output_value(node: fx.Node, call: AttentionCall) -> Any:
    """The recorded value of the attention's output."""
    value = value_of(node)
    return value[call.output] if call.output is not None and isinstance(value, (tuple, list)) else value
