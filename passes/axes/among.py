"""Queries that are some of the keys: which ones, and where their video may lie in what they read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dynamicrad_compile.plans.layout import Range

from .concatenation import glue, parts_of, rows_of, same_part, sources
from .labels import Axis, Label, Part, label_size, resolve

Triple = tuple[int, int, int]


def asked_keys(query: Label, key: Label, starts: Sequence[int]) -> Range | None:
    """(start, stop) of the keys that the queries are; None where that is not certain.

    starts: where the keys have the tokens of the queries; there they must have their positions, too.
    """
    size, wanted = label_size(query), parts_of(query)
    found = []
    for start in starts:
        rows = glue([piece for part in rows_of(key, start, start + size) for piece in sources(part)])
        if len(rows) == len(wanted) and all(same_part(a, b) for a, b in zip(rows, wanted, strict=True)):
            found.append((start, start + size))
    return found[0] if len(found) == 1 else None


def cut(key: Label, asked: Range) -> tuple[Part, ...]:
    """The pieces of the keys, cut where the queries begin and end."""
    cuts = (0, *asked, label_size(key))
    return tuple(part for low, high in itertools.pairwise(cuts) for part in glue(rows_of(key, low, high)))


def frames_apart(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The pieces, of which one may be some whole frames of a product of three axes: that is a product of its own.

    Of several, as of pictures in another order, nothing is said.
    """
    found = tuple(map(_some_frames, parts))
    return found if sum(a is not b for a, b in zip(found, parts, strict=True)) == 1 else tuple(parts)


def _some_frames(part: Part) -> Part:
    axes = resolve(part.label)
    area = label_size(axes[1:])
    if part.whole or len(axes) != 3 or part.start % area or part.stop % area or any(axis.table for axis in axes):
        return part
    frames = Axis(part.size // area, axes[0].source)
    frames.parts = (Part(axes[:1], part.start // area, part.stop // area),)
    frames.conflict = axes[0].conflict
    return Part((frames, *axes[1:]), 0, part.size)


def overlaps(parts: Sequence[Part], at: int, asked: Range) -> bool:
    """Whether a piece of the keys holds tokens of the queries."""
    start = sum(part.size for part in parts[:at])
    return start < asked[1] and start + parts[at].size > asked[0]


def with_earlier(parts: Sequence[Part], asked: Range, grid: Triple, shown: Sequence[Triple | None]) -> Range | None:
    """(start, stop) of a grid among the keys whose last frames are the queries; None where it does not fit.

    parts   pieces of the keys, cut where the queries begin and end
    shown   for each of them the grid that the graph shows, None where it shows none

    It begins where a piece does, the queries are whole frames of it, and pieces that are known have frames of its size.
    """
    frame, stop = math.prod(grid[1:]), asked[1]
    start = stop - math.prod(grid)
    place, begins = 0, False
    for part, size in zip(parts, shown, strict=True):
        begins = begins or place == start
        if begins and place < stop and (part.size % frame or (size is not None and size[1:] != grid[1:])):
            return None
        place += part.size
    return (start, stop) if begins and start < asked[0] else None
