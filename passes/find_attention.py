"""Find the attention calls of a graph.

Before:  %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)      (functional, torch._C._nn, or aten)
         %out = softmax(%q @ %k^T * scale + %m) @ %v                        (see reading.softmax_attention)
         %out = flash_attn._flash_attn_forward(%q, %k, %v, ...)             (see reading.library_attention)
         %out = multi_head_attention_forward(%x, %x, %x, ...)               (see reading.multihead_attention)
After:   the same graph; `context.sites` holds one `Site` with the call's arguments by name

A near miss is left alone: linear attention (matrix products without a softmax) is no site.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dynamicrad_compile.reporting.reason import Reason

from .context import PassContext
from .graph import module_path
from .operators.names import tensor_value
from .reading.layout import layout_of_rank, plain_shape
from .reading.library_attention import read_library_attention
from .reading.multihead_attention import read_multihead_attention
from .reading.softmax_attention import read_softmax_attention
from .reading.transforms import inside_transforms, transformed
from .reading.writes import Positions
from .site import AttentionCall, Site
from .writing.checkpoints import higher_order_name, nested_graphs

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
    positions, inside = Positions(gm.graph), inside_transforms(gm.graph)
    unrolled = {piece for found in context.rings for piece in found.ring.pieces}
    for node in gm.graph.nodes:
        call = None if node in unrolled else read_attention(gm, node, positions)
        if call is not None:
            refusal = transformed(node, inside)
            context.sites.append(_site(node, dataclasses.replace(call, refusal=refusal) if refusal else call))
        else:
            context.sites.extend(_hidden_sites(gm, node))
    return len(context.sites)


def _site(node: fx.Node, call: AttentionCall) -> Site:
    shape, key_shape = plain_shape(call, 0), plain_shape(call, 1)
    site = Site(node, call, module_path(node), q_shape=shape)
    site.kv_length = key_shape[2] if key_shape else None
    return site


def _hidden_sites(gm: fx.GraphModule, node: fx.Node) -> list[Site]:
    """Attention calls in the graphs of a higher-order operator (cond, while_loop, ...): seen, and left dense."""
    found = []
    for nested in nested_graphs(gm, node):
        positions = Positions(nested.graph)
        for inner in nested.graph.nodes:
            call = read_attention(nested, inner, positions)
            if call is not None:
                found.append(_site(inner, dataclasses.replace(call, refusal=_inside(node))))
            else:
                found.extend(_hidden_sites(nested, inner))
    return found


def _inside(node: fx.Node) -> Reason:
    return Reason(
        "inside_operator",
        f"it is inside {higher_order_name(node)} ({node.name}), whose graphs are not rewritten",
        "call the attention outside of it, or choose the branch in Python",
    )


def read_attention(gm: fx.GraphModule, node: fx.Node, positions: Positions) -> AttentionCall | None:
    """The attention that ends in a node; None if none does."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.op == "call_function" and node.target in SDPA:
        return read_call(node)
    for found in (read_multihead_attention(node), read_library_attention(gm, node)):
        if found is not None:
            return found
    return read_softmax_attention(node, positions)


def read_call(node: fx.Node) -> AttentionCall:
    """Arguments of a scaled_dot_product_attention call by name."""
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = dict(bound.arguments)
    given["mask"] = given.pop("attn_mask")
    tensors = [tensor_value(given[name]) for name in ("query", "key", "value")]
    layouts = [layout_of_rank(x.dim()) if x is not None else "bhsd" for x in tensors]
    given["layouts"] = (*layouts, layouts[0])
    given["mask_layout"] = layouts[0].replace("s", "q").replace("d", "k")
    mask, out = tensor_value(given["mask"]), tensor_value(node)
    given["mask_is"] = "keep" if mask is None or mask.dtype == torch.bool else "bias"
    given["dtype"] = out.dtype if out is not None else None  # under autocast it is not the operands'
    return AttentionCall(**given)
