"""Heads that several processes share are dealt to them by their work (see reading/heads for their way).

Before:  %cut = reshape(%heads, B, S / n, n, H / n, D), and on to the attention of another process
         %all = flatten(%back, 0, 1), [H, B, S / n, D] from the attentions of all processes
After:   %dealt = index_select(%heads, 2, %order), which %cut reads; of query, key and value
         %model = index_select(%all, 0, %inverse), which takes the place of %all

As many bytes are sent as before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import fx

from dynamicrad_compile.plans.order import inverse

from ..operators.names import operand
from ..site import PlannedSite, Site
from .buffers import buffer_node
from .operands import rename


def deal_heads(gm: fx.GraphModule, planned: PlannedSite, sites: Sequence[Site]) -> None:
    """Put the heads of a site into the order of its plan; `sites` are all whose calls may use its output."""
    order, way = planned.head_order, planned.video.exchange
    if order is None or way is None:
        return
    there, back = _orders(order, planned.video.device)
    for node, dim in way.sent:
        source = operand(node)
        with gm.graph.inserting_before(node):
            node.replace_input_with(source, _selected(gm, source, dim, there))
    node, dim = way.heard
    with gm.graph.inserting_before(node.next):
        new = _selected(gm, node, dim, back)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    rename(sites, node, new)


def _selected(gm: fx.GraphModule, x: fx.Node, dim: int, order: torch.Tensor) -> fx.Node:
    """Node of x with a dimension in another order."""
    new = gm.graph.call_function(torch.index_select, (x, dim, buffer_node(gm, "heads", order)))
    new.meta = dict(x.meta)
    return new


@functools.lru_cache(maxsize=16)
def _orders(order: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [H] twice: an order of the heads, and the way back."""
    with torch.inference_mode(False):
        there = torch.tensor(order, dtype=torch.int64, device="cpu")
        return there.to(device), inverse(there).to(device)
