"""dynamicrad::make_plan: the plan table of a grid that is known only when the graph runs.

A graph compiled for symbolic frames, height or width can't hold its plan as a constant. It calls this op with the
sizes instead; tables are built once a grid on the host and kept, so a call costs one copy of a few small tensors.
"""

from __future__ import annotations

import functools
import math

import torch

from ..kernels.blocks import cdiv
from .layout import MIN_FRAMES, Range, too_long
from .order import inverse
from .table import PlanSpec

Table = tuple[torch.Tensor, ...]
NAMES = ("counts", "indices", "forced", "near", "thresholds", "order", "inverse", "q_order", "q_inverse")
"""What a graph reads of a table of P regimes and K criteria, for m blocks of queries and n of keys: kv_counts int32
[P, 1, m], kv_indices int32 [P, 1, m, n], kv_forced and kv_near int32 [P, 1, m], thresholds fp32 [P, 3 K]; the order of
keys and its inverse, int64 [`PlanSpec.orders`, keys]; those of queries likewise, with no row where all tokens ask: they
are those of keys. In the order of NAMES, which are those of `PlanTable.tensors`."""

QUERIES, TABLE = "SymInt? q_start=None, SymInt? q_len=None", f"({', '.join(['Tensor'] * len(NAMES))})"
"""The range of the queries, and a Table, in the schema of an op."""


def full_table(
    spec: PlanSpec, grid: tuple[int, int, int], text_before: int, text_after: int, queries: Range | None = None
) -> Table:
    """The table of `spec` for a grid, on the CPU; its indices as wide as any grid with as many tokens may need.

    Fewer than MIN_FRAMES frames are no video: they are dense, as are sequences that are too long for a pattern.
    queries: (start, stop) of the tokens that ask, None: all.
    """
    tokens = math.prod(grid) + text_before + text_after
    asked = None if queries is None else queries[1] - queries[0]
    if grid[0] < MIN_FRAMES or too_long(tokens, spec.block_size):
        return dense_table(spec, tokens, asked)
    table = spec.build(grid, text_before, text_after, queries)
    candidates, plan = table.candidates, table.plan
    indices = torch.nn.functional.pad(plan.kv_indices, (0, plan.num_kv_blocks - plan.kv_indices.shape[-1]))
    orders = list(_places(spec, tokens, asked))
    for at, order in ((0, plan.order), (2, plan.query_order)):
        if order is not None and len(orders[at]):
            orders[at] = order.expand(spec.orders, -1).contiguous()
            orders[at + 1] = inverse(orders[at])
    return plan.kv_counts, indices, candidates.kv_forced, candidates.kv_near, table.thresholds, *orders


def dense_table(spec: PlanSpec, tokens: int, queries: int | None = None) -> Table:
    """The table that keeps all blocks of a sequence of so many tokens, on the CPU; queries None: all of them ask."""
    counts, *rest = empty_table(spec, tokens, torch.empty(0, dtype=torch.float32, device="cpu"), queries)
    indices, forced, near, thresholds = (t.zero_() for t in rest[:4])
    full = indices.shape[-1]
    return counts.fill_(full), indices, forced, near, thresholds, *_places(spec, tokens, queries)


def empty_table(spec: PlanSpec, tokens: int, like: torch.Tensor, queries: int | None = None) -> Table:
    """A table for a sequence of so many tokens, on the device of `like`, with nothing in it; queries as above."""
    rows, blocks = (cdiv(n, spec.block_size) for n in (tokens if queries is None else queries, tokens))
    regimes = len(spec.regimes)
    counts, forced, near = (like.new_empty((regimes, 1, rows), dtype=torch.int32) for _ in range(3))
    indices = like.new_empty((regimes, 1, rows, blocks), dtype=torch.int32)
    thresholds = like.new_empty((regimes, 3 * len(spec.criteria)), dtype=torch.float32)
    sizes = _order_sizes(spec, tokens, queries)
    orders = (like.new_empty(size, dtype=torch.int64) for size in sizes)
    return counts, indices, forced, near, thresholds, *orders


def _order_sizes(spec: PlanSpec, tokens: int, queries: int | None) -> tuple[tuple[int, int], ...]:
    """Shapes of the orders of keys and of queries, and their inverses."""
    keys, asking = (spec.orders, tokens), (0, tokens) if queries is None else (spec.orders, queries)
    return keys, keys, asking, asking


def _places(spec: PlanSpec, tokens: int, queries: int | None) -> tuple[torch.Tensor, ...]:
    """Orders, and inverses, of tokens as they come, on the CPU."""
    sizes = _order_sizes(spec, tokens, queries)
    return tuple(torch.arange(n, dtype=torch.int64, device="cpu").repeat(rows, 1) for rows, n in sizes)


@functools.lru_cache(maxsize=16)
def _on_device(
    spec: str, grid: tuple[int, int, int], text: tuple[int, int], queries: Range | None, device: torch.device
) -> Table:
    table = full_table(PlanSpec.from_json(spec), grid, *text, queries)
    return tuple(x.to(device) for x in table)


@torch.library.custom_op(
    "dynamicrad::make_plan",
    mutates_args=(),
    schema="(Tensor like, SymInt frames, SymInt height, SymInt width, SymInt text_before, SymInt seq_len, str spec, "
    f"{QUERIES}) -> {TABLE}",
)
def make_plan_op(
    like: torch.Tensor,
    frames: int,
    height: int,
    width: int,
    text_before: int,
    seq_len: int,
    spec: str,
    q_start: int | None = None,
    q_len: int | None = None,
) -> Table:
    """The table of `spec` for a grid in a sequence of seq_len keys, on `like`'s device; see `Table`.

    q_start and q_len: the range of them that asks; None: all.
    """
    text_after = seq_len - text_before - frames * height * width
    queries = None if q_start is None or q_len is None else (q_start, q_start + q_len)
    table = _on_device(spec, (frames, height, width), (text_before, text_after), queries, like.device)
    return tuple(x.clone() for x in table)  # the graph may write over them


@make_plan_op.register_fake
def _(
    like: torch.Tensor,
    frames: int,
    height: int,
    width: int,
    text_before: int,
    seq_len: int,
    spec: str,
    q_start: int | None = None,
    q_len: int | None = None,
) -> Table:
    return empty_table(PlanSpec.from_json(spec), seq_len, like, None if q_start is None else q_len)
