"""The way of an attention's heads to other processes and back, where it is views and one exchange (Ulysses).

    %heads : [B, S / n, H, D]           reshape: [B, S / n, n, H / n, D], in front of it all heads are one dimension
    %sent  : [n, S / n, B, H / n, D]    permute, flatten; all_to_all_single: the first n go to n processes
    %query : [B, H / n, S, D]           the heads of this process
    %out   : [n, H / n, B, S / n, D]    and back; flatten(0, 1): [H, B, S / n, D], all heads again

Two things are followed from node to node, the heads and the process that has them. Each is a factor of the tensor's
row-major index: (size, inner) is index // inner % size, which a reshape leaves as it is, whatever it does to the shape.
All processes find the same: they run one program on pieces of the same shapes, and unequal pieces are not followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import fx

from ..axes.labels import Peers
from ..graph import hint, shape_hint, value_of
from ..operators.names import op_name, operand, operator_name
from ..operators.process_groups import peers_of
from ..operators.table import permutation
from ..site import AttentionCall, HeadExchange, Site
from .layout import operands_of, output_value, plain_shape

_REGROUPED = ("reshape", "view", "unsqueeze", "squeeze", "same", "clone", "cast", "_c10d_functional::wait_tensor")
"""What leaves the elements in their row-major order."""

Shape: TypeAlias = Sequence[int]


class _Factor(NamedTuple):
    """index // inner % size, of a tensor's row-major index."""

    size: int
    inner: int


class _Heads(NamedTuple):
    """The heads, or those of one process, and in front of them the process; None on the attention's side."""

    own: _Factor
    process: _Factor | None = None


def head_exchange(site: Site, peers: Peers) -> HeadExchange | None:
    """The way of a site's heads among these processes; None where it isn't exactly so for all four tensors."""
    call = site.call
    heads = {shape[1] for which in range(3) if (shape := plain_shape(call, which)) is not None}
    one_layout = all(layout.count("h") == 1 and "t" not in layout for layout in call.layouts)
    if site.group is not None or call.projections is not None or not one_layout or len(heads) != 1:
        return None
    ways = zip(operands_of(call), call.layouts, strict=False)
    sent = [_sent(node, layout.index("h"), peers) for node, layout in ways]
    heard = _heard(site.node, call, peers)
    found = [place for place in sent if place is not None]
    if heard is None or len({node for node, _ in found}) != 3:
        return None
    return HeadExchange(tuple(found), heard)


def _sent(node: fx.Node, dim: int, peers: Peers) -> tuple[fx.Node, int] | None:
    """From an operand back to the node in front of which all heads are one dimension, and this dimension."""
    shape = shape_hint(node)
    heads = None if shape is None else _Heads(_factor(shape, dim))
    while heads is not None and len(node.users) == 1:
        user, node = node, operand(node)
        before, after = shape_hint(node) if isinstance(node, fx.Node) else None, shape_hint(user)
        if before is None or after is None:
            return None
        heads = _passed(user, heads, after, before, peers, backwards=True)
        together = None if heads is None else _together(heads, before)
        if together is not None:
            return user, together
    return None


def _heard(node: fx.Node, call: AttentionCall, peers: Peers) -> tuple[fx.Node, int] | None:
    """From the attention on to the node that holds all heads as one dimension, and this dimension."""
    value = output_value(node, call)
    if call.output is not None and len(node.users) == 1:
        (node,) = node.users
        if op_name(node) != "getitem" or node.args[1] != call.output:
            return None
    shape = tuple(map(hint, value.shape))
    heads: _Heads | None = _Heads(_factor(shape, call.layouts[3].index("h")))
    while heads is not None and len(node.users) == 1:
        (node,) = node.users
        before, shape_after = shape, shape_hint(node)
        if shape_after is None:
            return None
        shape = shape_after
        heads = _passed(node, heads, before, shape, peers, backwards=False)
        together = None if heads is None else _together(heads, shape)
        if together is not None:
            return node, together
    return None


def _passed(node: fx.Node, heads: _Heads, shape: Shape, other: Shape, peers: Peers, backwards: bool) -> _Heads | None:
    """Heads on the other side of a node: in what it reads (`backwards`) or gives; None where that can't be said.

    shape, other: of the tensor on this side, and on the other one.
    """
    if str(node.target).endswith("_") or math.prod(shape) != math.prod(other):
        return None
    if operator_name(node.target).endswith("::all_to_all_single"):
        return _exchanged(node, heads, shape, peers)
    if op_name(node) in _REGROUPED:
        return heads
    order = permutation(node, len(shape))
    if order is None:
        return None
    places = order if backwards else [order.index(d) for d in range(len(order))]
    moved = [factor if factor is None else _moved(factor, shape, other, places) for factor in heads]
    lost = any(new is None and old is not None for new, old in zip(moved, heads, strict=True))
    return None if lost or moved[0] is None else _Heads(moved[0], moved[1])


def _exchanged(node: fx.Node, heads: _Heads, shape: Shape, peers: Peers) -> _Heads | None:
    """Heads beyond an all-to-all in which every process sends as much to each."""
    splits = [_size(size) for sizes in node.args[1:3] for size in _listed(sizes)]
    each = math.prod(shape) // peers.size
    whole = each * peers.size == math.prod(shape) and each % (heads.own.size * heads.own.inner) == 0
    alike = len(set(splits)) <= 1 and all(size * peers.size == shape[0] for size in splits)
    if heads.process is not None or not whole or not alike or peers_of(node.args[3]) != peers:
        return None
    return _Heads(heads.own, _Factor(peers.size, each))


def _together(heads: _Heads, shape: Shape) -> int | None:
    """The dimension that is all heads, one process's after the other's; None where none is."""
    own, process = heads
    if process is None or process.inner != own.size * own.inner:
        return None
    every = _Factor(process.size * own.size, own.inner)
    return next((d for d in range(len(shape)) if _factor(shape, d) == every), None)


def _moved(factor: _Factor, shape: Shape, other: Shape, places: Sequence[int]) -> _Factor | None:
    """A factor that is a dimension, where that is permuted to another place; None where it is none.

    places: for each dimension of `shape` its place in `other`.
    """
    dim = next((d for d in range(len(shape)) if _factor(shape, d) == factor), None)
    return None if dim is None else _factor(other, places[dim])


def _factor(shape: Shape, dim: int) -> _Factor:
    """A dimension as a factor of the index."""
    return _Factor(shape[dim], math.prod(shape[dim + 1 :]))


def _listed(sizes: Any) -> Iterator[Any]:
    yield from sizes or ()


def _size(size: Any) -> int:
    """A size among the arguments of a node as an int; -1 where it is unknown."""
    found = value_of(size) if isinstance(size, fx.Node) else size
    return -1 if found is None else hint(found)
