"""Replace planned attentions by the block-sparse op.

Before:  %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)
After:   %counts, %indices = get_attr                                 (shared by sites with the same plan)
         %keys = %m[:, 0, 0]                                          (only with a key padding mask)
         %q, %k, %v in the layout [B, H, S, D]                        (see reading/layout)
         %pair = dynamicrad.block_sparse_attention(%q, %k, %v, %counts, %indices, scale, block_q, block_kv, %keys)
         %out = %pair[0], in the layout and the memory order that the original had

Where the plan's blocks are boxes of the video, %q, %k, %v and %keys are put into its order of tokens, and %out back
(see plans/order); Inductor does that where it writes and reads them anyway. Queries that are some of the keys have an
order of their own.

In a graph with symbolic sizes the plan is made when the graph runs, from the sizes that it then has:

         %f, %h, %w, %s = sym_size of nodes that hold these axes
         %counts, %indices = dynamicrad.make_plan(%q, %f, %h, %w, text_before, %s, spec)

Where the grid was read from the values of a position table, the plan holds only while the table shows that grid
(see writing/table_plan), or with symbolic sizes

         %counts, %indices = dynamicrad.plan_of_positions(%q, %table, dim, text_before, %s, spec)

Where an axis is in no shape and no table of a graph with symbolic sizes, those sizes become constants: another
resolution compiles again. So does a number of tokens for which another decision would have been made.
Whatever the case, no graph uses a plan that was made for a different grid.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from dynamicrad_compile.kernels import moments_op as _registers_the_ops  # noqa: F401
from dynamicrad_compile.plans.layout import MIN_FRAMES
from dynamicrad_compile.plans.order import reordered_keys
from dynamicrad_compile.reporting.reason import FIX_LENGTH, FIX_SIZES, Reason

from .axes.positions import PositionTable, is_of_shard, table_of
from .context import Dense, PassContext
from .graph import value_of
from .reading.masks import keys_node, without_hidden_rows
from .reading.support import few_frames
from .site import PlannedSite, Replacement, Site
from .writing.chunks import split
from .writing.control import Controls
from .writing.heads import deal_heads
from .writing.int8 import attend, dense_steps
from .writing.operands import copy_origin, into_order, original_output, plain_operands, take_over
from .writing.plans import PlanWriter, WrittenPlan
from .writing.ring import from_whole_blocks, settle, to_whole_blocks
from .writing.search import found_blocks, keep, search
from .writing.selection import select
from .writing.sizes import (
    RuntimeSizes,
    hold_decisions,
    make_constant,
    marked_dynamic,
    runtime_sizes,
    symbolic_inputs,
    vary,
)
from .writing.table_plan import grids_of

SEARCH_IN_TRAINING = "its pattern searches blocks at steps of a run, and training has no run"
TRAIN_WITH_OTHERS = "train with pattern 'dynamicrad', or 'dense'"
ONE_SIZE = "what it keeps from step to step has one size"
UNMARK = "leave mark_dynamic out, or use maybe_mark_dynamic: then each grid is compiled for itself"


def replace_attention(gm: fx.GraphModule, context: PassContext) -> int:
    """Rewrite the graph; returns the number of replaced sites."""
    if not context.is_final:
        hold_decisions(gm, context)
    placed, homes = _placed(gm, context)
    if placed:
        _replace_all(gm, context, placed, homes)
    for site in context.sites:
        if site.chunks and not site.replaced:
            site.reason = max(site.chunks, key=lambda chunk: chunk.kv_length or 0).reason
    by_node = {site.node: site for site in context.sites}
    for found in context.rings:
        settle(gm.graph, found, by_node[found.node])
    return sum(site.replaced for site in context.sites)


def _replace_all(
    gm: fx.GraphModule, context: PassContext, placed: Sequence[PlannedSite], homes: dict[fx.Node, RuntimeSizes]
) -> None:
    sites = [one for site in context.sites for one in (site, *site.chunks)]
    ready = {id(planned.video.site) for planned in placed}
    for site in context.sites:
        if any(id(chunk) in ready for chunk in site.chunks):
            split(gm.graph, site, sites)
    controls = Controls(gm, context, placed[0].video.device)
    writer = PlanWriter(gm, context, controls, homes)
    for planned in placed:
        deal_heads(gm, planned, sites)
        planned.video.site.replacement = _replace(gm, planned, context, sites, writer, writer.write(planned))
        context.notes += _how_planned(planned, homes.get(planned.video.node))


def _dynamic(context: PassContext, names: Sequence[str], why: str) -> Reason:
    text = f"sizes {', '.join(names)} are dynamic, and {why}"
    return Reason("dynamic_sizes", text, FIX_SIZES if context.is_final else UNMARK)


def _placed(gm: fx.GraphModule, context: PassContext) -> tuple[Sequence[PlannedSite], dict[fx.Node, RuntimeSizes]]:
    """The sites whose plans can be placed in the graph, and where it holds the sizes of plans made when it runs."""
    planned = context.planned
    one_grid = any(isinstance(d, Dense) and d.this_grid for d in context.decisions.sites)
    sizes = symbolic_inputs(gm, context) if planned or one_grid else []
    chunks = {id(p) for p in planned if p.video.site.group is not None}
    sizes += [size for site in context.sites for size in site.mask_sizes if chunks]
    marked = marked_dynamic(gm, context)
    is_open = context.is_final or any(marked & size.node.expr.free_symbols for size in sizes)  # they can't be constants
    one_grid = one_grid and not is_open
    followed = [p for p in planned if p.spec is not None and p.spec.follows_grid and id(p) not in chunks]
    found = {p.video.node: runtime_sizes(p.video, context) for p in followed}
    homes = {node: where for node, where in found.items() if where is not None}
    symbolic = bool(sizes) and len(homes) == len(planned) and not one_grid
    if sizes and not symbolic:
        if is_open:
            reason = _dynamic(context, sorted({str(size) for size in sizes}), _why_fixed(planned))
            for p in planned:
                p.video.site.reason = reason
            return [], {}
        make_constant(sizes)
    at_run_time = {
        p.video.node
        for p in planned
        if p.video.site.data_dependent or (symbolic and vary(homes[p.video.node], p.video.call))
    }
    for node in homes.keys() - at_run_time:
        del homes[node]
    placed = []
    for p in planned:
        frames = p.video.grid[0]
        if p.table.searches is not None and context.training:
            p.video.site.reason = Reason("search_in_training", SEARCH_IN_TRAINING, TRAIN_WITH_OTHERS)
        elif p.video.site.data_dependent and p.video.node not in homes:
            why = ONE_SIZE if p.table.searches is not None else _why_fixed([p])
            p.video.site.reason = Reason("data_dependent_length", f"its length depends on data, and {why}", FIX_LENGTH)
        elif _keeps(p, context) and p.video.node not in homes and not _of_one_size(gm, p, context):
            names = [str(size) for size in _query_sizes(p)]
            p.video.site.reason = _dynamic(context, names, ONE_SIZE)
        elif p.video.axes and frames < MIN_FRAMES and p.video.node not in homes:
            p.video.site.reason = few_frames(frames)
        else:
            placed.append(p)
    return placed, homes


def _keeps(planned: PlannedSite, context: PassContext) -> bool:
    """Whether a site keeps from step to step which blocks it reads."""
    refreshes = bool(planned.table.criteria) and context.decisions.control.refresh_steps > 0
    return planned.table.searches is not None or refreshes


def _query_sizes(planned: PlannedSite) -> list[torch.SymInt]:
    """Symbolic sizes of the query, such as its batch."""
    return [size for size in value_of(planned.video.call.query).shape if isinstance(size, torch.SymInt)]


def _of_one_size(gm: fx.GraphModule, planned: PlannedSite, context: PassContext) -> bool:
    """Make the sizes of the query constants; False where they can't be."""
    sizes, marked = _query_sizes(planned), marked_dynamic(gm, context)
    if any(context.is_final or marked & size.node.expr.free_symbols for size in sizes):
        return False
    make_constant(sizes)
    return True


def _how_planned(planned: PlannedSite, where: RuntimeSizes | None) -> list[str]:
    """What is to be said of a plan that follows the grid, or holds for one grid of several."""
    table = table_of(planned.video.axes)
    if where is not None and isinstance(where.grid, PositionTable):
        return [
            f"sizes are symbolic: the grid is read from the values of {where.grid.node.name} when the graph runs, one "
            f"plan for each grid it meets; fewer than {MIN_FRAMES} frames run dense"
        ]
    if where is not None:
        return ["sizes are symbolic: plans are made when the graph runs, one for each grid it meets"]
    if table is None:
        return []
    grids = " and ".join("x".join(map(str, grid)) for grid in grids_of(planned))
    rows, rest = "the values", ""
    if is_of_shard(planned.video.axes):
        rows = "this process's rows"
        rest = "; other processes read theirs, and one whose rows do not tell the grid stays dense"
    return [
        f"the grid was read from {rows} of {table.node.name} and is looked up at each call: "
        f"{grids} run sparse, other grids of as many tokens run dense{rest}"
    ]


def _why_fixed(planned: Sequence[PlannedSite]) -> str:
    """Why plans can't be made when the graph runs."""
    if any(p.video.site.group is not None for p in planned):
        return "its mask is known for these sizes alone"
    fixed = any(p.spec is None or not p.spec.follows_grid for p in planned)
    return "its plan is for one grid" if fixed else "an axis of its grid is in no shape of the graph"


def _replace(
    gm: fx.GraphModule,
    planned: PlannedSite,
    context: PassContext,
    sites: list[Site],
    writer: PlanWriter,
    written: WrittenPlan,
) -> Replacement:
    """Put the op in the place of a site."""
    video, table, graph = planned.video, planned.table, gm.graph
    node, call, plan = video.node, video.call, table.plan
    nodes, stats = written.nodes, written.stats
    before = node.prev
    with graph.inserting_before(node):
        keys = keys_node(graph, call)
        scale = None if call.scale is None else float(call.scale)
        operands, given = plain_operands(graph, call), keys
        operands[0] = to_whole_blocks(gm, operands[0], planned, video.device)
        ask, answer = (nodes.q_order, nodes.q_inverse), (nodes.order, nodes.inverse)
        pairs = zip(operands, (ask, answer, answer), strict=True)
        operands = [into_order(graph, x, *order, context.training) for x, order in pairs]
        if keys is not None and nodes.order is not None:
            keys = graph.call_function(reordered_keys, (keys, nodes.order))
        kept, always = None, nodes
        if table.criteria:
            nodes = select(gm, planned, operands, keys, nodes, writer.controls, written.num_kv)
        elif table.searches is not None:
            kept = keep(gm, context, planned, video.device)
            nodes = found_blocks(planned, nodes, kept, writer.controls)
        if (table.criteria or kept is not None) and writer.varies(planned):
            stats = writer.record(nodes, planned, written.num_kv)
        arguments = (*operands, nodes.counts, nodes.indices, scale, plan.block_q, plan.block_kv, keys)
        if nodes.compensate is not None:
            arguments = (*arguments, nodes.compensate)
        options = {"qk_int8": True} if context.qk_int8 == "always" else {}
        op = torch.ops.dynamicrad.block_sparse_attention.default
        if planned.overhead:
            op = torch.ops.dynamicrad.second_order_attention.default
        rounded_at = dense_steps(planned, writer.controls) if context.qk_int8 == "dense steps" else None
        if context.qk_int8 == "dense steps" and rounded_at is None:
            context.notes.append("qk_dtype 'int8_dense' does nothing here: no step is dense")
        if rounded_at is not None:
            pair, out, lse = attend(graph, op, arguments, rounded_at)
        else:
            pair = graph.call_function(op, arguments, options)
            out, lse = graph.call_function(operator.getitem, (pair, 0)), None
        if kept is not None:
            lse = lse or graph.call_function(operator.getitem, (pair, 1))
            search(gm, planned, operands, keys, always, kept, lse, writer.controls)
        out = into_order(graph, out, nodes.q_inverse, nodes.q_order, context.training)
        out = from_whole_blocks(graph, out, planned)
        if given is not None:
            out = without_hidden_rows(graph, call, out, given)
        out = original_output(graph, video.site, out)
    copy_origin(before, node)
    take_over(graph, video.site, out, sites)
    return Replacement(pair, plan, stats, planned.overhead, table.sparsity, "" if kept is None else kept.stats)
