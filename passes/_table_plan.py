"""A plan that holds only while a position table shows its grid; see decode_positions.

    %ok = %table has the structure of grid                          (a few comparisons, on the device)
    %counts = where(%ok, %counts_of_grid, number of kv blocks)      (a full count is dense attention)

Portrait and landscape have the same number of tokens, so the plan of the transposed grid is carried along.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from dynamicrad_compile.plan import BlockPlan
from dynamicrad_compile.plan_op import PlanSpec

from ._site import Site
from .decode_positions import PositionTable, columns_of

ConstantPlan = Any  # (plan, name) -> nodes of counts and indices


def grids_of(site: Site) -> list[tuple[int, int, int]]:
    """The grids that get sparse attention in a graph whose grid was read from a table."""
    assert site.grid is not None
    frames, height, width = site.grid
    return [site.grid] if height == width else [site.grid, (frames, width, height)]


def table_of(site: Site) -> PositionTable | None:
    """The table from which the site's grid was read, None if it was in a shape."""
    return next((axis.table for axis in site.grid_axes if axis.table is not None), None)


def guarded_plan(
    gm: fx.GraphModule, site: Site, table: PositionTable, constant: ConstantPlan
) -> tuple[fx.Node, fx.Node]:
    """Nodes of counts and indices: those of the grid that the table shows, dense if it is none of `grids_of`."""
    graph = gm.graph
    spec = PlanSpec.from_json(site.plan_spec)
    plans = [spec.build(grid, *site.text) for grid in grids_of(site)]
    width = max(plan.kv_indices.shape[-1] for plan in plans)
    call = graph.call_function
    counts: Any = None
    indices: Any = None
    for grid, plan in reversed(list(zip(grids_of(site), plans, strict=True))):
        padding = width - plan.kv_indices.shape[-1]
        padded = BlockPlan(
            plan.kv_counts, torch.nn.functional.pad(plan.kv_indices, (0, padding)),
            plan.block_q, plan.block_kv, plan.q_len, plan.kv_len,
        )  # fmt: skip
        plan_counts, plan_indices = constant(padded)
        ok = _shows(graph, table, grid)
        if counts is None:
            counts, indices = call(torch.full_like, (plan_counts, plan.num_kv_blocks)), plan_indices
        counts = call(torch.where, (ok, plan_counts, counts))
        indices = call(torch.where, (ok, plan_indices, indices))
    return counts, indices


def _shows(graph: fx.Graph, table: PositionTable, grid: tuple[int, int, int]) -> fx.Node:
    """Node of a bool scalar: each of the table's three columns varies with its own axis of `grid` alone."""
    call = graph.call_function
    value = call(columns_of, (table.node, table.dim))
    checks = []
    for d, column in enumerate(table.columns):
        cube = call(torch.reshape, (call(torch.select, (value, 1, column)), grid))
        line = call(operator.getitem, (cube, tuple(slice(None) if k == d else slice(0, 1) for k in range(3))))
        checks.append(call(torch.all, (call(torch.eq, (cube, line)),)))
        rest = call(torch.narrow, (line, d, 1, grid[d] - 1))
        checks.append(call(torch.all, (call(torch.ne, (rest, call(torch.narrow, (line, d, 0, 1)))),)))
    return functools.reduce(lambda a, b: call(torch.logical_and, (a, b)), checks)
