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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamicrad_compile.reporting.reason import SET_GRID, Reason

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


class Axis:
    """One axis; see the module's docstring. `conflict` says why nothing more may be concluded of it."""

    __slots__ = (
        "alias", "blank", "born", "conflict", "factors", "feature", "kin", "mirror", "parent", "parts", "reversed",
        "size", "source", "table", "why",
    )  # fmt: skip

    def __init__(self, size: int, source: Source, parent: Axis | None = None, born: str = ""):
        self.size = size
        self.source = source
        self.parent = parent
        self.born = born  # the node whose reshape or alignment split it off its parent
        self.blank = False  # rows of a new buffer: nothing is in them until they are written
        self.feature = source.kind == "feature"  # outputs of a projection: channels, heads, query-key-value
        self.why: Reason | None = None  # why nothing is known of it, where there is a reason to give
        self.kin: tuple[Axis, ...] = ()  # axes that turned out to be this one
        self.alias: Axis | None = None
        self.factors: tuple[Axis, ...] | None = None
        self.parts: tuple[Part, ...] | None = None
        self.conflict: Reason | None = None
        self.mirror: Axis | None = None  # the same rows, last first
        self.reversed = False  # a flip made it, or a mixture of rows that are reversed and rows that are not
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


def label_size(label: Label) -> int:
    """Number of positions of a label."""
    return math.prod(axis.size for axis in label)


def fresh(size: int, source: Source) -> Label:
    """Label of a dimension of which nothing is known."""
    return () if size == 1 else (Axis(size, source),)


def resolve(label: Label) -> Label:
    """The label in its finest known axes, following aliases and factors."""
    leaves: list[Axis] = []
    for axis in label:
        while axis.alias is not None:
            axis = axis.alias
        if axis.factors is not None:
            leaves.extend(resolve(axis.factors))
        else:
            leaves.append(axis)
    return tuple(leaves)


def split(axis: Axis, outer: int, node: str = "") -> tuple[Label, Label] | None:
    """Split a leaf axis into (outer, rest) because `node` needs it; None where that is impossible."""
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
        factor.blank = axis.blank
        factor.feature = axis.feature
    return axis.factors[:1], axis.factors[1:]


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


def unify(first: Label, second: Label, why: str) -> Label:
    """The label of a dimension that is both `first` and `second` (they have the same size)."""
    left, right = list(resolve(first)), list(resolve(second))
    while left and right:
        x, y = left[0], right[0]
        if x is y or x.size == y.size:
            if x is not y:
                _merge(x, y, why)
            left.pop(0)
            right.pop(0)
            continue
        big, small = (left, right) if x.size > y.size else (right, left)
        halves = split(big[0], small[0].size, why) if small[0].size else None
        if halves is not None:
            big[:1] = [*halves[0], *halves[1]]
            continue
        inner = list(small)
        taken = take(inner, big[0].size, why) if big[0].parts else None
        if taken is None or not _regard(big[0], taken):
            _refuse(big[0], small[0], why)
            break
        big[:1], small[:] = [], inner
    return first


def _regard(joined: Axis, label: Label) -> bool:
    """Learn that a concatenation, or a slice, has the positions of a product of axes; False where it has not."""
    pieces = parts_of((joined,))
    if any(_holds(joined, axis) for axis in label) and not (len(pieces) == 1 and pieces[0].whole):
        return False
    if len(pieces) == 1:
        if pieces[0].whole and resolve(pieces[0].label) != resolve(label):
            return False
        joined.parts, joined.factors = None, label
        return True
    unknown = [resolve(piece.label) for piece in pieces]
    if any(len(x) > 1 or not piece.whole or set(x) & set(label) for x, piece in zip(unknown, pieces, strict=True)):
        return False
    offset = 0
    for axes, piece in zip(unknown, pieces, strict=True):
        for axis in axes:
            axis.parts = rows_of(label, offset, offset + piece.size)
        offset += piece.size
    return True


def _merge(x: Axis, y: Axis, why: str) -> None:
    """Make two leaf axes of the same size one axis, unless one is the other in reverse order."""
    if (x.mirror or y.mirror or x.parent or y.parent) and are_mirrored((x,), (y,)):
        return
    if x.parts and y.parts and min(len(x.parts), len(y.parts)) > 1:
        if [p.size for p in x.parts] != [p.size for p in y.parts]:
            _refuse(x, y, why)
            return
        for a, b in zip(x.parts, y.parts, strict=True):
            if a.whole and b.whole:
                unify(a.label, b.label, why)
    keep, drop = (x, y) if _rank(x) >= _rank(y) else (y, x)
    if _holds(keep, drop):  # rows of an axis, put together again and aligned with it
        keep, drop = drop, keep
    if _holds(keep, drop):
        _refuse(x, y, why)
        return
    keep.conflict = keep.conflict or drop.conflict
    keep.why = keep.why or drop.why
    keep.mirror = keep.mirror or drop.mirror
    keep.feature = keep.feature or drop.feature
    keep.kin = (*keep.kin, drop, *drop.kin)
    drop.alias = keep


def _holds(axis: Axis, inner: Axis) -> bool:
    """Whether `inner` is among the pieces of `axis`."""
    leaves = (leaf for part in axis.parts or () for leaf in resolve(part.label))
    return any(leaf is inner or _holds(leaf, inner) for leaf in leaves)


def _refuse(x: Axis, y: Axis, why: str) -> None:
    """Record that two structures of one dimension contradict each other."""
    text = f"{why} aligns an axis of {x.size} ({x.source}) with one of {y.size} ({y.source})"
    reason = Reason("axes_disagree", text, SET_GRID)
    x.conflict = x.conflict or reason
    y.conflict = y.conflict or reason


def _rank(axis: Axis) -> tuple[bool, bool, bool, bool, int]:
    """Which of two merged axes says more: a concatenation, an input, a slice of something, anything, a new buffer."""
    pieces = len(axis.parts or ())
    return (pieces > 1, axis.source.kind == "input", pieces == 1, not axis.blank, axis.source.rank)


def parts_of(label: Label) -> tuple[Part, ...]:
    """The label as pieces of a concatenation; a label that is none is one piece. Contiguous pieces are glued."""
    if isinstance(label, Row):
        return (label.part,)
    leaves = resolve(label)
    if len(leaves) == 1 and leaves[0].parts:
        return glue([inner for part in leaves[0].parts for inner in rows_of(part.label, part.start, part.stop)])
    return (Part(leaves, 0, label_size(leaves)),)


def rows_of(label: Label, start: int, stop: int) -> tuple[Part, ...]:
    """Pieces of rows `start..stop` of a label."""
    kept: list[Part] = []
    offset = 0
    for part in parts_of(label):
        low, high = max(start, offset), min(stop, offset + part.size)
        if low < high:
            base = part.start - offset
            kept.append(Part(part.label, low + base, high + base))
        offset += part.size
    return tuple(kept)


def segments_of(label: Label) -> tuple[Part, ...]:
    """`parts_of`, where frames put together from several sources are several pieces as well."""
    out: list[Part] = []
    for part in parts_of(label):
        leaves = resolve(part.label)
        pieces = parts_of(leaves[:1]) if part.whole and len(leaves) > 1 else ()
        area = label_size(leaves[1:])
        if len(pieces) > 1:
            out.extend(Part((*p.label, *leaves[1:]), p.start * area, p.stop * area) for p in pieces)
        else:
            out.append(part)
    return glue(out)


def glue(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join neighbouring pieces that are contiguous rows of the same label; drop empty ones."""
    out: list[Part] = []
    for part in parts:
        if part.size == 0:
            continue
        label = resolve(part.label)
        if out and out[-1].stop == part.start and label and _same_leaves(out[-1].label, label):
            out[-1] = Part(label, out[-1].start, part.stop)
        else:
            out.append(Part(label, part.start, part.stop))
    return tuple(out)


def concat(parts: Sequence[Part], source: Source) -> Label:
    """Label of a concatenation."""
    pieces = glue(parts)
    size = sum(part.size for part in pieces)
    if size == 1:
        return Row.of(pieces[0]) if pieces and resolve(pieces[0].label) else ()
    if len(pieces) == 1 and pieces[0].whole:
        return pieces[0].label
    axis = Axis(size, source)
    axis.parts = pieces
    leaves = [leaf for part in pieces for leaf in resolve(part.label)]
    axis.feature = bool(leaves) and all(leaf.feature for leaf in leaves)
    return (axis,)


def slice_label(label: Label, start: int, stop: int, source: Source) -> Label:
    """Label of rows `start..stop` (step 1) of a dimension."""
    if start == 0 and stop == label_size(label):
        return label
    kept = rows_of(label, start, stop)
    return concat(kept, source) if kept else fresh(0, source)


def same(first: Label, second: Label) -> bool:
    """Whether two labels are known to be the same positions in the same order."""
    one, two = parts_of(first), parts_of(second)
    return len(one) == len(two) and all(same_part(a, b) for a, b in zip(one, two, strict=True))


def same_part(a: Part, b: Part) -> bool:
    """Whether two pieces are the same rows of the same label. A single row has no axis to be told by."""
    if a.size == b.size == 1 and not (resolve(a.label) and resolve(b.label)):
        return True
    return a.start == b.start and a.stop == b.stop and _same_leaves(resolve(a.label), resolve(b.label))


def within(a: Part, b: Part) -> bool:
    """Whether a piece is among the rows of another."""
    return b.start <= a.start and a.stop <= b.stop and _same_leaves(resolve(a.label), resolve(b.label))


def _same_leaves(a: Label, b: Label) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def coarsest(label: Label) -> Label:
    """The label with halves that stand side by side put together again (6 x 2 of one axis is that axis of 12)."""
    out: list[Axis] = []
    for leaf in resolve(label):
        out.append(leaf)
        while len(out) >= 2 and (parent := out[-1].parent) is not None and parent.factors is not None:
            inner = resolve(parent.factors)
            if len(inner) > len(out) or not _same_leaves(tuple(out[-len(inner) :]), inner):
                break
            out[-len(inner) :] = [parent]
    return tuple(out)
