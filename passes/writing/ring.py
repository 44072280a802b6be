"""A ring becomes one attention of the local queries over the gathered keys, where that can be sparse.

Before:  %all = all_gather(cat([%k.flatten(), %v.flatten()])); one attention for each process, merged    (reading/ring)
After:   the same, and beside it, used by nothing yet:
         %keys, %values = all_gather of %k and %v, tokens first              as many bytes
         %out = scaled_dot_product_attention(%q, %keys, %values)

The new attention is a site like any other. If it is replaced it takes the ring's place (`settle`); if it stays dense it
goes, and the ring's attentions read rows of %keys and %values. Either way the ring's own collective goes: all processes
exchange the same, whatever each of them has found.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ..graph import value_of
from ..reading.layout import from_plain
from ..site import Gathered, PlannedSite, Ring, Site
from .buffers import buffer_node
from .operands import plain_operands


def write_beside(graph: fx.Graph, ring: Ring) -> Gathered:
    """Write one attention over all keys in front of a ring."""
    first, call = ring.pieces[0], ring.calls[0]
    before = first.prev
    with graph.inserting_before(first):
        query, key, value = plain_operands(graph, call)
        keys, values = (_all_rows(graph, x, ring) for x in (key, value))
        node = graph.call_function(F.scaled_dot_product_attention, (query, keys, values), {"scale": call.scale})
        out = from_plain(graph, node, call.layouts[3], None)
        for step in ring.steps:
            out = graph.create_node(step.op, step.target, (out, *step.args[1:]), dict(step.kwargs))
    for new in between(before, first):
        _record(new)
        new.meta |= {name: first.meta[name] for name in ("nn_module_stack", "stack_trace") if first.meta.get(name)}
    return Gathered(ring, keys, values, node, out)


def between(start: fx.Node, stop: fx.Node) -> Iterator[fx.Node]:
    """The nodes between two others."""
    node = start.next
    while node is not stop:
        yield node
        node = node.next


def _all_rows(graph: fx.Graph, x: fx.Node, ring: Ring) -> fx.Node:
    """Node of the rows [B, H, S, D] of all processes, from those of this one."""
    call, size = graph.call_function, ring.peers.size
    rows = call(torch.ops.aten.contiguous.default, (call(torch.permute, (x, (2, 0, 1, 3))),))
    sent = call(torch.ops._c10d_functional.all_gather_into_tensor.default, (rows, size, ring.group))
    heard = call(torch.ops._c10d_functional.wait_tensor.default, (sent,))
    whole = call(torch.flatten, (call(torch.unflatten, (heard, 0, (size, -1))), 0, 1))
    return call(torch.permute, (whole, (1, 2, 0, 3)))


def _record(node: fx.Node) -> None:
    """Note what a new node yields, as Dynamo does."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    modes = [x.fake_mode for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
    with modes[0] if modes else nullcontext(), torch.no_grad():
        method = node.op == "call_method"
        node.meta["example_value"] = (getattr(args[0], node.target) if method else node.target)(
            *args[1:] if method else args, **kwargs
        )


def to_whole_blocks(gm: fx.GraphModule, query: fx.Node, planned: PlannedSite, device: torch.device) -> fx.Node:
    """Node of the queries [B, H, S, D], with as many more as the rows of their plan are for.

    Of a block that lies across processes each fills the rest with its own next queries, mirrored: they resemble what is
    missing, by which blocks may be chosen. What is computed for them is dropped.
    """
    asked, own = planned.asked, planned.video.queries
    if asked is None or own is None or asked == own:
        return query
    places = buffer_node(gm, "filled", _mirrored(asked[0] - own[0], asked[1] - own[0], own[1] - own[0], device))
    return gm.graph.call_function(torch.index_select, (query, 2, places))


@functools.lru_cache(maxsize=16)
def _mirrored(start: int, stop: int, n: int, device: torch.device) -> torch.Tensor:
    """int64 [stop - start]: the places start..stop of n rows that go on mirrored at both ends."""
    with torch.inference_mode(False):
        place = torch.arange(start, stop, device="cpu")
        place = torch.where(place < 0, -1 - place, torch.where(place >= n, 2 * n - 1 - place, place)) % n
        return place.to(device)


def from_whole_blocks(graph: fx.Graph, out: fx.Node, planned: PlannedSite) -> fx.Node:
    """Node of the rows of an output [B, H, S, D] that are those of the site's queries."""
    asked, own = planned.asked, planned.video.queries
    if asked is None or own is None or asked == own:
        return out
    return graph.call_function(torch.narrow, (out, 2, own[0] - asked[0], own[1] - own[0]))


def settle(graph: fx.Graph, found: Gathered, site: Site) -> None:
    """Let a new attention that was replaced take the place of its ring; else let the ring read what was gathered."""
    ring = found.ring
    if site.replaced:
        found.out.meta = {**ring.merged.meta, **found.out.meta}
        ring.merged.replace_all_uses_with(found.out)
        _remove(graph, [ring.merged, *_above(ring)])
        return
    dead = [found.out]
    for piece, call, rank in list(zip(ring.pieces, ring.calls, ring.ranks, strict=True))[1:]:
        with graph.inserting_before(piece):
            keys, values = (call.key, found.keys, call.layouts[1]), (call.value, found.values, call.layouts[2])
            for old, whole, layout in (keys, values):
                n = value_of(old).shape[layout.index("s")]
                rows = from_plain(graph, graph.call_function(torch.narrow, (whole, 2, rank * n, n)), layout, None)
                piece.replace_input_with(old, rows)
                dead.append(old)
    _remove(graph, dead)


def _above(ring: Ring) -> list[fx.Node]:
    """What only the merged log-sum-exp of a ring needs."""
    todo, seen = list(ring.pieces), dict[fx.Node, None]()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen[node] = None
            todo += node.users
    return [node for node in seen if not node.users]


def _remove(graph: fx.Graph, dead: list[fx.Node]) -> None:
    """Erase nodes that nothing uses, and what they alone need."""
    while dead:
        node = dead.pop()
        if node.users or node.op in ("placeholder", "output") or node.graph is not graph or node._erased:
            continue
        needed = list(node.all_input_nodes)
        graph.erase_node(node)
        dead += needed
