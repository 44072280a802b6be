"""A plan that holds only while a position table shows its grid; see decode_positions.

    %ok = %table has the structure of grid                          (a few comparisons, on the device)
    %counts = where(%ok, %counts_of_grid, number of kv blocks)      (a full count is dense attention)

Portrait and landscape have the same number of tokens, so the plan of the transposed grid is carried along.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import fx

from dynamicrad_compile.plans.packed import Packed, shows_video
from dynamicrad_compile.plans.positions import Triple, columns_of, frames_in
from dynamicrad_compile.plans.positions_shard import DecodedShard, shows_shard
from dynamicrad_compile.plans.shares import shard_of
from dynamicrad_compile.plans.table import PlanSpec, PlanTable

from ..axes.positions import PositionTable
from ..site import PlannedSite
from .control import PlanNodes


def grids_of(planned: PlannedSite) -> list[Triple]:
    """The grids that get sparse attention in a graph whose grid was read from a table."""
    frames, height, width = grid = planned.video.grid
    return [grid] if height == width or planned.spec is None else [grid, (frames, width, height)]


def guarded_plan(
    gm: fx.GraphModule,
    planned: PlannedSite,
    table: PositionTable,
    constant: Callable[[Mapping[str, torch.Tensor]], PlanNodes],
) -> PlanNodes:
    """Nodes of the plan of the grid that the table shows, dense if it is none of `grids_of`."""
    call = gm.graph.call_function
    spec, grids = planned.spec, grids_of(planned)
    plans = [planned.table] if spec is None else [_table(planned, spec, grid) for grid in grids]
    width = max(plan.plan.kv_indices.shape[-1] for plan in plans)
    found: PlanNodes | None = None
    for grid, plan in reversed(list(zip(grids, plans, strict=True))):
        tensors = plan.tensors()
        indices = torch.nn.functional.pad(tensors["indices"], (0, width - tensors["indices"].shape[-1]))
        nodes = constant({**tensors, "indices": indices})
        ok = _shows(gm.graph, table, grid)
        if found is None:
            dense = call(torch.full_like, (nodes.counts, plan.plan.num_kv_blocks))
            found = replace(nodes, counts=call(torch.where, (ok, nodes.counts, dense)))
        else:
            pairs = zip(vars(nodes).values(), vars(found).values(), strict=True)
            found = PlanNodes(*(None if a is None else call(torch.where, (ok, a, b)) for a, b in pairs))
    assert found is not None
    return found


def _table(planned: PlannedSite, spec: PlanSpec, grid: Triple) -> PlanTable:
    """The plans of a site for another grid of as many tokens."""
    video = planned.video
    if video.shard and video.queries is not None:
        return shard_of(spec, grid, video.text, video.queries)[0]
    return spec.build(grid, *video.text, video.queries)


def _shows(graph: fx.Graph, table: PositionTable, grid: Triple) -> fx.Node:
    """Node of a bool scalar: each of the table's three columns varies with its own axis of `grid` alone, by frames.

    The same pictures around the frames are references.
    """
    call, shown = graph.call_function, table.shown
    value = call(columns_of, (table.node, table.dim))
    if isinstance(shown, DecodedShard):
        return call(shows_shard, (value, grid, *shown[1:]))
    if isinstance(shown, Packed):
        return call(shows_video, (value, grid, *shown[1:4]))
    whole = (shown.grid[0], *grid[1:])
    checks = [call(frames_in, (value, whole, *shown.checked))]
    for d, column in enumerate(shown.columns):
        cube = call(torch.reshape, (call(torch.select, (value, 1, column)), whole))
        line = call(operator.getitem, (cube, tuple(slice(None) if k == d else slice(0, 1) for k in range(3))))
        checks.append(call(torch.all, (call(torch.eq, (cube, line)),)))
        rest = call(torch.narrow, (line, d, 1, whole[d] - 1))
        checks.append(call(torch.all, (call(torch.ne, (rest, call(torch.narrow, (line, d, 0, 1)))),)))
    return functools.reduce(lambda a, b: call(torch.logical_and, (a, b)), checks)
