"""Derivatives and batches that a graph is captured for: what is computed under them is never replaced.

    %level = _jvp_increment_nesting()          torch.func.jvp inside what is compiled; grad and vmap likewise
    %out = scaled_dot_product_attention(...)   on tensors that carry a tangent
    _jvp_decrement_nesting()

The block-sparse ops have no forward-mode derivative.
"""

from __future__ import annotations

import torch
from torch import fx

from dynamicrad_compile.reporting.reason import Reason


def inside_transforms(graph: fx.Graph) -> set[fx.Node]:
    """The nodes inside grad, jvp or vmap of torch.func, those that begin and end it included."""
    inside, depth = set(), 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        depth += name.endswith("_increment_nesting")
        if depth or getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
            inside.add(node)
        depth -= name.endswith("_decrement_nesting")
    return inside


def transformed(node: fx.Node, inside: set[fx.Node]) -> Reason | None:
    """Why a node can't be replaced because of a transform that it is captured under."""
    if node in inside:
        text = "it is inside grad, jvp or vmap of torch.func, which is compiled with it"
        return Reason("inside_transform", text, "compile the model and transform what is compiled, not the reverse")
    if torch.autograd.forward_ad._current_level >= 0:
        text = "the graph is captured for forward-mode derivatives, which block-sparse attention has not"
        return Reason("forward_mode", text, "use reverse mode (backward, torch.func.vjp)")
    return None
