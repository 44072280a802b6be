"""How the dimensions of a mask move, read from a node: its elements are rearranged or repeated, never changed.

A mask is followed back in the words of its author, so that repetition shows: an axis of kind COPY is one along which
the mask is the same.
"""

from __future__ import annotations

import math

from torch import fx

from ...axes.labels import Label, Source, fresh, label_size
from ...axes.reshape import reshape
from ..calls import Shape
from ..names import argument

COPY = "copy"  # kind of an axis along which a mask repeats itself


def same(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """The same dimensions."""
    return labels


def regroup(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """The same elements in other dimensions."""
    if math.prod(inner) != math.prod(shape):
        return None
    return reshape(labels, list(shape), Source(node.name, 0, "op", len(shape)))


def repeat(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """Sizes of 1 grow by repetition, as in `expand`; `repeat` of a larger size puts copies in front."""
    offset = len(shape) - len(inner)
    out: list[Label] = []
    for d, n in enumerate(shape):
        old = labels[d - offset] if d >= offset else ()
        copies, rest = divmod(n, label_size(old))
        if rest:
            return None
        out.append((*fresh(copies, Source(node.name, d, COPY, len(shape))), *old))
    return out


def repeat_interleave(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """Each row of one dimension several times in a row."""
    dim, times = argument(node, 2, "dim"), argument(node, 1, "repeats")
    if not isinstance(dim, int) or not isinstance(times, int):
        return None
    out = list(labels)
    out[dim] = (*out[dim], *fresh(times, Source(node.name, dim, COPY, len(shape))))
    return out


def getitem(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """Whole dimensions, new ones and single positions; anything else is not followed."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        missing = len(inner) - sum(i is not None for i in index) + 1
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    out: list[Label] = []
    left = list(labels)
    for i in index:
        if i is None:
            out.append(())
        elif i == slice(None) and left:
            out.append(left.pop(0))
        elif isinstance(i, int) and left:
            left.pop(0)
        else:
            return None
    return [*out, *left]


def whole(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """A slice that takes everything."""
    return labels if inner == shape else None
