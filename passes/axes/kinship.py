"""An axis by all its names: those that turned out to be it, and the axes that it is a factor of.

Which of two aligned axes keeps its name depends on their order in an operation. So what is asked of an axis's origin is
asked of all of them.
"""

from __future__ import annotations

from .labels import Axis, Source


def kinship(axis: Axis) -> set[Axis]:
    """The axis, those that turned out to be it, and those of which it is a factor."""
    return _closure(axis, parents=True)


def names(axis: Axis) -> set[Axis]:
    """The axis and those that turned out to be it."""
    return _closure(axis, parents=False)


def roots(axis: Axis) -> set[Axis]:
    """The axes that an axis is a part of, before any split."""
    return {one for one in kinship(axis) if one.parent is None}


def inputs(axis: Axis) -> set[Source]:
    """The dimensions of inputs that the axis is."""
    return {one.source for one in names(axis) if one.source.kind == "input"}


def _closure(axis: Axis, parents: bool) -> set[Axis]:
    found: set[Axis] = set()
    todo = [axis]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo.extend(one.kin)
            if parents and one.parent is not None:
                todo.append(one.parent)
    return found
