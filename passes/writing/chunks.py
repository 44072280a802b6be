"""An attention whose mask divides its queries into groups becomes attentions without a mask, one for each group.

Before:  %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)
After:   %a = scaled_dot_product_attention(%q[:, :, :96], %k[:, :, :96], %v[:, :, :96])
         %b = scaled_dot_product_attention(%q[:, :, 96:192], %k[:, :, :192], %v[:, :, :192])
         %out = cat((%a, %b), 2), in the layout and the memory order that the original had

Each is then a site like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx

from dynamicrad_compile.plans.layout import Range

from ..reading.layout import plain_shape
from ..site import AttentionCall, Site
from .operands import copy_origin, original_output, plain_operands, take_over


def split(graph: fx.Graph, site: Site, sites: list[Site]) -> None:
    """Put the chunks of a site in its place; `sites` are all whose calls may use its output."""
    node, call, before = site.node, site.call, site.node.prev
    heads = plain_shape(call, 1)
    grouped = {"enable_gqa": True} if site.q_shape and heads and site.q_shape[1] != heads[1] else {}
    outs = []
    with graph.inserting_before(node):
        query, key, value = plain_operands(graph, call)
        for chunk in site.chunks:
            assert chunk.group is not None
            q = _rows(graph, query, [chunk.group.rows])
            k, v = (_rows(graph, x, chunk.group.keys) for x in (key, value))
            options = {"scale": call.scale, **grouped}
            chunk.node = graph.call_function(F.scaled_dot_product_attention, (q, k, v), options)
            chunk.call = AttentionCall(q, k, v, scale=call.scale)
            outs.append(chunk.node)
        out = outs[0] if len(outs) == 1 else graph.call_function(torch.cat, (outs, 2))
        out = original_output(graph, site, out)
    copy_origin(before, node)
    take_over(graph, site, out, sites)


def _rows(graph: fx.Graph, x: fx.Node, ranges: Sequence[Range]) -> fx.Node:
    """Node of some rows of x [B, H, S, D]."""
    whole = slice(None)
    pieces = [graph.call_function(operator.getitem, (x, (whole, whole, slice(*rows), whole))) for rows in ranges]
    return pieces[0] if len(pieces) == 1 else graph.call_function(torch.cat, (pieces, 2))
