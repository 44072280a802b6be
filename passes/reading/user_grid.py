"""The user's grid against what the graph shows: how many tokens an attention has, and in which order."""

from __future__ import annotations

import math

from dynamicrad_compile.errors import GridError

from ..axes.grids import Grids
from ..axes.labels import Part
from ..context import PassContext
from ..site import OTHER_SELF, SPATIAL, TEMPORAL, VIDEO, Site

SELF = (OTHER_SELF, SPATIAL, TEMPORAL)


def check_user_grid(grid: tuple[int, int, int], sites: list[Site], misfits: list[GridError]) -> None:
    """The user's grid must fit some sequence, unless the graph holds only much shorter ones (text)."""
    if any(site.role == VIDEO for site in sites):
        return
    if misfits:
        raise misfits[0]
    lengths = [(s.q_shape[-2], s) for s in sites if (s.role in SELF or _is_given(s)) and s.q_shape]
    if not lengths:
        return
    length, longest = max(lengths, key=lambda pair: pair[0])
    if 4 * length >= math.prod(grid):
        raise GridError(grid_message(grid, length, longest))


def _is_given(site: Site) -> bool:
    return site.reason is not None and site.reason.code == "behind_graph_break"


def check_fit(context: PassContext, part: Part, site: Site, grids: Grids) -> None:
    """Raise GridError unless the part has as many tokens as the user's grid, and the graph does not show another."""
    grid = context.grid
    assert grid is not None
    if math.prod(grid) != part.size:
        raise GridError(grid_message(grid, part.size, site))
    shown = "" if context.override_grid else _shown(part, grid, grids)
    if shown:
        raise GridError(
            f"grid {_by(grid)} contradicts the graph: the {part.size} video tokens of the attention at "
            f"{_place(site)} are {shown}. Leave `grid` out to have it traced, or set `override_grid` if you mean it."
        )


def _shown(part: Part, grid: tuple[int, int, int], grids: Grids) -> str:
    """What the graph shows where it is certain that a piece is no such grid; "" where it is not."""
    if part.whole:
        return grids.contradiction(part.label, grid)
    size = grids.size(part.label)
    return "" if size is None or size[1:] == grid[1:] else f"rows of {_by(size)}"


def grid_message(grid: tuple[int, int, int], length: int, site: Site) -> str:
    """What is wrong with a grid for so many video tokens, and how to mend it."""
    padding = ""
    if math.prod(grid) < length < 2 * math.prod(grid):
        padding = (
            f" If the other {length - math.prod(grid)} are padding behind it: that counts as such only where rows of "
            "the inputs are alike; leave it out if you can."
        )
    return (
        f"grid {_by(grid)} = {math.prod(grid)} tokens does not fit the {length} video tokens of the attention at "
        f"{_place(site)}. Give the latent grid after patchifying (frames, height, width), "
        f"or leave `grid` out to have it traced.{padding}"
    )


def _by(grid: tuple[int, int, int]) -> str:
    return " x ".join(map(str, grid))


def _place(site: Site) -> str:
    return site.path or site.node.name
