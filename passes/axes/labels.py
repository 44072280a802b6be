"""Axis algebra: where each dimension of a tensor comes from.

A *label* describes one dimension of a tensor: the row-major product of axes, as a tuple of `Axis`; `()` is a
dimension of size 1. An axis is an unknown until something is learnt of it:

* it may turn out to be another axis (`alias`), because an elementwise operation aligned the two;
* it may turn out to be a product of smaller axes (`factors`), because a reshape or an alignment split it;
* it may be a concatenation of pieces (`parts`), because `cat`, `pad`, a slice or writes into a buffer made it so.

What is learnt of an axis holds for every tensor that carries it: a RoPE table built from three aranges labels
the packed sequence that it multiplies, and a reshape after the last layer labels the sequence of the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from dynamicrad_compile.reporting.reason import Reason

Label = tuple["Axis", ...]


@dataclass(frozen=True)
class Source:
    """Where an axis was first seen: a node of the graph and one of its dimensions."""

    node: str
    dim: int
    kind: str  # "input" | "op" | "feature"
    rank: int = 0  # number of dimensions of the tensor

    def __str__(self) -> str:
        return f"dim {self.dim} of {self.node}"


@dataclass(frozen=True)
class Part:
    """A piece of a concatenation: rows `start..stop` of a label's index space."""

    label: Label
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == label_size(self.label)


class Peers(NamedTuple):
    """A group of processes that run the same program: their global ranks, and the place of this one among them."""

    ranks: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.ranks)


class Shard(NamedTuple):
    """The rows of a sequence that this process holds of it; its peers hold the others, in order."""

    rows: Part
    peers: Peers


class Axis:
    """One axis; see the module's docstring. `conflict` says why nothing more may be concluded of it."""

    __slots__ = (
        "alias", "blank", "born", "carved", "conflict", "factors", "feature", "free", "kin", "mirror", "mixed",
        "parent", "parts", "peers", "reversed", "shard", "size", "source", "table", "why",
    )  # fmt: skip

    def __init__(self, size: int, source: Source, parent: Axis | None = None, born: str = ""):
        self.size = size
        self.source = source
        self.parent = parent
        self.born = born  # the node whose reshape or alignment split it off its parent
        self.carved = False  # its parts are only rows that were aligned with something: a reshape may undo that
        self.blank = False  # rows of a new buffer: nothing is in them until they are written
        self.feature = source.kind == "feature"  # outputs of a projection: channels, heads, query-key-value
        self.why: Reason | None = None  # why nothing is known of it, where there is a reason to give
        self.kin: tuple[Axis, ...] = ()  # axes that turned out to be this one
        self.alias: Axis | None = None
        self.factors: tuple[Axis, ...] | None = None
        self.parts: tuple[Part, ...] | None = None
        self.conflict: Reason | None = None
        self.free = False  # output of an attention over mixed rows: it is whatever it meets, and tells nothing of that
        self.mixed: Reason | None = None  # why its rows are of two orders: whatever it met, it is no other axis
        self.mirror: Axis | None = None  # the same rows, last first
        self.reversed = False  # a flip made it, or a mixture of rows that are reversed and rows that are not
        self.shard: Shard | None = None  # the rows of a sequence that this process holds of it
        self.peers: Peers | None = None  # positions along it are the processes of a group
        self.table: Any = None  # a PositionTable: this axis was read from values that may change from call to call

    def __repr__(self) -> str:
        inner = f"={list(self.parts)}" if self.parts else ""
        return f"<{self.size} {self.source}{inner}>"


class Row(tuple["Axis", ...]):
    """Label of a dimension of size 1 that is one row of an axis: `()` that remembers which."""

    part: Part

    @staticmethod
    def of(part: Part) -> Label:
        """The label of a single row."""
        row = Row()
        row.part = part
        return row


class Within(tuple["Axis", ...]):
    """Label of what one row of an axis holds, as the places of one frame: it remembers which rows of both they are."""

    part: Part

    @staticmethod
    def of(row: Part, label: Label) -> Label:
        """The label of a dimension behind the one of which a row was taken."""
        size = label_size(label)
        if row.whole or size == 1 or not label or row.size != 1:
            return label
        within = Within(label)
        within.part = Part((*row.label, *label), row.start * size, row.stop * size)
        return within


def mirrored(label: Label, source: Source) -> Label:
    """The label with its rows in reverse order; reversed again, it is the label itself."""
    out: list[Axis] = []
    for axis in resolve(label):
        if axis.mirror is None:
            axis.mirror = Axis(axis.size, source)
            axis.mirror.mirror, axis.mirror.reversed = axis, True
            axis.mirror.feature, axis.mirror.blank = axis.feature, axis.blank
        out.append(axis.mirror)
    return resolve(tuple(out))


def are_mirrored(first: Label, second: Label) -> bool:
    """Whether an axis of one label is an axis of the other in reverse order."""
    mirrors = {leaf for axis in resolve(first) for one in _line(axis) if one.mirror for leaf in _line(one.mirror)}
    return any(one in mirrors for axis in resolve(second) for one in _line(axis))


def _line(axis: Axis) -> list[Axis]:
    """The axis, as it is known now, and the axes that it is a part of."""
    while axis.alias is not None:
        axis = axis.alias
    return [axis, *(_line(axis.parent) if axis.parent is not None else ())]


def mixed(label: Label) -> Reason | None:
    """Why the rows of a label, or of a piece of it, are of two orders; None if they are not."""
    for axis in resolve(label):
        pieces = () if axis.mixed else axis.parts or ()
        found = axis.mixed or next((why for part in pieces if (why := mixed(part.label))), None)
        if found:
            return found
    return None


def is_free(label: Label) -> bool:
    """Whether a label is of an attention's output of which nothing is known, or a piece of it is."""
    return any(axis.free or any(is_free(part.label) for part in axis.parts or ()) for axis in resolve(label))


def label_size(label: Label) -> int:
    """Number of positions of a label."""
    return math.prod(axis.size for axis in label)


def fresh(size: int, source: Source) -> Label:
    """Label of a dimension of which nothing is known."""
    return () if size == 1 else (Axis(size, source),)


def resolve(label: Label) -> Label:
    """The label in its finest known axes, following aliases and factors; an axis of mixed rows is just that."""
    leaves: list[Axis] = []
    for axis in label:
        while axis.alias is not None and axis.mixed is None:
            axis = axis.alias
        if axis.factors is not None and axis.mixed is None:
            leaves.extend(resolve(axis.factors))
        else:
            leaves.append(axis)
    return tuple(leaves)


def split(axis: Axis, outer: int, node: str = "") -> tuple[Label, Label] | None:
    """Split a leaf axis into (outer, rest) because `node` needs it; None where that is impossible."""
    if axis.carved:
        mend(axis)
    if axis.size % outer or (axis.parts is not None and len(axis.parts) > 1):
        return None
    if outer == 1:
        return (), (axis,)
    if outer == axis.size:
        return (axis,), ()
    axis.parts = None  # a slice: of which rows is forgotten
    axis.factors = (
        Axis(outer, axis.source, axis, node),
        Axis(axis.size // outer, axis.source, axis, node),
    )
    for factor in axis.factors:
        factor.blank, factor.free = axis.blank, axis.free
        factor.feature = axis.feature
    return axis.factors[:1], axis.factors[1:]


def mend(axis: Axis) -> None:
    """Make a carved axis one again, its pieces rows of it, unless more is known of them."""
    pieces = [resolve(part.label) for part in axis.parts or ()]
    if any(len(leaves) > 1 or any(leaf.parts for leaf in leaves) for leaves in pieces):
        return
    start = 0
    for part, leaves in zip(axis.parts or (), pieces, strict=True):
        for leaf in leaves:
            leaf.parts = (Part((axis,), start, start + part.size),)
        start += part.size
    axis.parts, axis.carved = None, False


def take(leaves: list[Axis], size: int, node: str = "") -> Label | None:
    """Remove leading axes of exactly `size` positions from `leaves`, splitting one if `node` needs it."""
    taken: list[Axis] = []
    need = size
    while need > 1:
        if not leaves:
            return None
        head = leaves[0]
        if head.size and need % head.size == 0:
            taken.append(leaves.pop(0))
            need //= head.size
            continue
        halves = split(head, need, node) if head.size and head.size % need == 0 else None
        if halves is None:
            return None
        taken.extend(halves[0])
        leaves[:1] = halves[1]
        need = 1
    return tuple(taken)


def same_axes(a: Label, b: Label) -> bool:
    """Whether two resolved labels are of the same axes."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def coarsest(label: Label) -> Label:
    """The label with halves that stand side by side put together again (6 x 2 of one axis is that axis of 12)."""
    out: list[Axis] = []
    for leaf in resolve(label):
        out.append(leaf)
        while len(out) >= 2 and (parent := out[-1].parent) is not None and parent.factors is not None:
            inner = resolve(parent.factors)
            if len(inner) > len(out) or not same_axes(tuple(out[-len(inner) :]), inner):
                break
            out[-len(inner) :] = [parent]
    return tuple(out)
