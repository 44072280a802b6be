"""Read the grid from the values of a position table where no shape of the graph shows it.

Before:  a compiled block: %q : [1, 2, 240, 24], %rope : [1, 240, 1, 24], nothing says what the 240 are
After:   the axis of 240 is 5 x 6 x 8; each of the three says in `table` how to check that later

In regional compilation the latents are outside the graph, but the RoPE table (or the coordinates) comes in as
an input, and Dynamo shows its real values at compile time. Each of its columns depends on frame, row or column
alone, so the distances after which columns first change are 1, width and height x width.

One such graph serves every grid with as many tokens, without being compiled again. So the table is looked at
each time the graph runs: a grid without a plan in the graph gets dense attention, never another grid's plan.
"""

from __future__ import annotations

import itertools

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .axes.concatenation import parts_of
from .axes.labels import Axis, resolve
from .axes.positions import PositionTable, columns_of
from .axes.reshape import reshape
from .site import PassContext

MIN_TOKENS = 8  # a grid has at least two frames, rows and columns


def decode_positions(gm: fx.GraphModule, context: PassContext) -> int:
    """Split sequence axes whose grid is shown by an input's values; returns how many."""
    wanted = {
        axis
        for site in context.sites
        if site.trace is not None and len(site.trace.query) >= 2
        for part in parts_of(site.trace.query[-2])
        if part.whole and len(axes := resolve(part.label)) == 1
        for axis in axes
        if axis.size >= MIN_TOKENS and not axis.parts
    }
    if not wanted:
        return 0
    found = 0
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), context.example_inputs, strict=False):
        if not isinstance(value, torch.Tensor) or isinstance(value, (FakeTensor, torch.nn.Parameter)):
            continue
        for dim, label in enumerate(context.node_labels.get(node, [])):
            axes = resolve(label)
            if len(axes) == 1 and axes[0] in wanted and value.shape[dim] == axes[0].size:
                found += _decode(node, value, dim, axes[0], context)
    return found


def _decode(node: fx.Node, value: torch.Tensor, dim: int, axis: Axis, context: PassContext) -> int:
    decoded = decode_table(columns_of(value.detach(), dim))
    if decoded is None:
        return 0
    grid, columns = decoded
    for label in reshape([(axis,)], grid, axis.source):
        for part in label:
            part.table = PositionTable(node, dim, columns, grid)
    return 1


def decode_table(table: torch.Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """(grid, columns) of a table [tokens, columns] whose columns depend on one axis of a raster grid each.

    `columns` are one each for frame, row and column. None if there is no such grid, or more than one.
    """
    tokens = table.shape[0]
    changes = table != table[:1]
    varying = changes.any(0).nonzero().flatten()
    if len(varying) < 3:
        return None
    table, changes = table[:, varying], changes[:, varying]
    steps = sorted(set(changes.to(torch.uint8).argmax(0).tolist()))
    fits = []
    for width, area in itertools.combinations(steps, 2):
        if steps[0] != 1 or width == 1 or area % width or tokens % area or tokens == area:
            continue
        grid = (tokens // area, area // width, width)
        picked = _one_axis_each(table, grid)
        if picked is not None:
            f, h, w = (int(varying[i]) for i in picked)
            fits.append((grid, (f, h, w)))
    return fits[0] if len(fits) == 1 else None


def _one_axis_each(table: torch.Tensor, grid: tuple[int, int, int]) -> list[int] | None:
    """For each axis a column that varies with it alone and never comes back to its first value; else None."""
    cube = table.reshape(*grid, -1)
    differs = torch.stack([(cube != cube.narrow(d, 0, 1)).flatten(0, 2).any(0) for d in range(3)])  # [3, columns]
    if bool((differs.sum(0) > 1).any()):
        return None
    first, columns = cube[0, 0, 0], []
    for d in range(3):
        line = cube.movedim(d, 0)[1:, 0, 0]
        usable = (differs[d] & (line != first).all(0)).nonzero().flatten()
        if not len(usable):
            return None
        columns.append(int(usable[0]))
    return columns
