"""Find the attention calls of a graph.

Before:  %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)      (functional, torch._C._nn, or aten)
After:   the same graph; `context.sites` holds one `Site` with the call's arguments by name

A near miss is left alone: linear attention (matrix products without a softmax) is no site.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ._graph import module_path, shape_hint
from ._site import AttentionCall, PassContext, Site

SDPA = (
    F.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)

_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("query", inspect.Parameter.empty),
            ("key", inspect.Parameter.empty),
            ("value", inspect.Parameter.empty),
            ("attn_mask", None),
            ("dropout_p", 0.0),
            ("is_causal", False),
            ("scale", None),
            ("enable_gqa", False),
        )
    ]
)


def find_attention(gm: fx.GraphModule, context: PassContext) -> int:
    """Append a `Site` for each attention call; returns how many were found."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in SDPA:
            call = read_call(node)
            site = Site(node, call, module_path(node), q_shape=shape_hint(call.query))
            key_shape = shape_hint(call.key)
            site.kv_length = key_shape[-2] if key_shape else None
            context.sites.append(site)
    return len(context.sites)


def read_call(node: fx.Node) -> AttentionCall:
    """Arguments of an attention call by name."""
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = dict(bound.arguments)
    given["mask"] = given.pop("attn_mask")
    return AttentionCall(**given)
