"""The share of a plan that one of several processes needs: the rows of its queries, or those of its heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from .layout import Range
from .plan import BlockPlan, Candidates
from .table import PlanSpec, PlanTable


def shard_of(spec: PlanSpec, grid: tuple[int, int, int], text: Sequence[int], tokens: Range) -> tuple[PlanTable, Range]:
    """The table for the queries start..stop that one process holds, and the tokens that its rows are for.

    In raster order its rows are those of the whole sequence's table; they begin and end with whole blocks. A box may
    lie across processes: there the queries are blocks of their own, with rows of their own.
    """
    before, after = text
    whole = spec.build(grid, before, after)
    if whole.plan.order is not None:
        return spec.build(grid, before, after, tokens), tokens
    asked = whole_blocks(tokens, whole.plan.block_q, whole.plan.kv_len)
    return rows_of(whole, asked), asked


def whole_blocks(tokens: Range, block_size: int, length: int) -> Range:
    """(start, stop) of the blocks that hold the tokens start..stop of `length`, in tokens."""
    start, stop = tokens
    return start // block_size * block_size, min(-(-stop // block_size) * block_size, length)


@functools.lru_cache(maxsize=64)
def rows_of(table: PlanTable, tokens: Range) -> PlanTable:
    """The rows of a table in raster order for the queries start..stop, which are whole blocks; see `whole_blocks`.

    Made once: the layers of a model share it.
    """
    found, block = table.candidates, table.plan.block_q
    rows = slice(tokens[0] // block, -(-tokens[1] // block))
    plan = replace(
        found.plan,
        kv_counts=found.plan.kv_counts[..., rows].contiguous(),
        kv_indices=found.plan.kv_indices[..., rows, :].contiguous(),
        q_len=tokens[1] - tokens[0],
        check_values=False,
    )
    forced, near = (x[..., rows].contiguous() for x in (found.kv_forced, found.kv_near))
    return replace(table, candidates=Candidates(plan, forced, near, check_values=False))


def heads_of(plan: BlockPlan, heads: Sequence[int]) -> BlockPlan:
    """The plan of some heads, in their order; the plan itself where all heads share its rows."""
    if plan.kv_counts.shape[1] == 1:
        return plan
    own = list(heads)
    return plan.with_rows(plan.kv_counts[:, own], plan.kv_indices[:, own])
