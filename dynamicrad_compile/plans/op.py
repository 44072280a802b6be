"""dynamicrad::make_plan: the plan table of a grid that is known only when the graph runs.

A graph compiled for symbolic frames, height or width can't hold its plan as a constant. It calls this op with the
sizes instead; tables are built once a grid on the host and kept, so a call costs one copy of a few small tensors.
"""

from __future__ import annotations

import functools
import math

import torch

from ..kernels.blocks import cdiv
from .layout import MIN_FRAMES, too_long
from .order import inverse
from .table import PlanSpec

Table = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
NAMES = ("counts", "indices", "forced", "near", "thresholds", "order", "inverse")
"""What a graph reads of a table of P regimes and K criteria, for M = ceil(tokens / block) blocks: kv_counts int32
[P, 1, M], kv_indices int32 [P, 1, M, M], kv_forced and kv_near int32 [P, 1, M], thresholds fp32 [P, 3 K]; the order of
tokens and its inverse, int64 [`PlanSpec.orders`, tokens]. In the order of NAMES, which are
those of `PlanTable.tensors`."""


def full_table(spec: PlanSpec, grid: tuple[int, int, int], text_before: int, text_after: int) -> Table:
    """The table of `spec` for a grid, on the CPU; its indices as wide as any grid with as many tokens may need.

    Fewer than MIN_FRAMES frames are no video: they are dense, as are sequences that are too long for a pattern.
    """
    tokens = math.prod(grid) + text_before + text_after
    if grid[0] < MIN_FRAMES or too_long(tokens, spec.block_size):
        return dense_table(spec, tokens)
    table = spec.build(grid, text_before, text_after)
    candidates, plan = table.candidates, table.plan
    indices = torch.nn.functional.pad(plan.kv_indices, (0, plan.num_kv_blocks - plan.kv_indices.shape[-1]))
    order = torch.empty(0, tokens, dtype=torch.int64, device="cpu")
    if plan.order is not None:
        order = plan.order.expand(spec.orders, -1).contiguous()
    forced, near = candidates.kv_forced, candidates.kv_near
    return plan.kv_counts, indices, forced, near, table.thresholds, order, inverse(order)


def dense_table(spec: PlanSpec, tokens: int) -> Table:
    """The table that keeps all blocks of a sequence of so many tokens, on the CPU."""
    counts, *rest = empty_table(spec, tokens, torch.empty(0, dtype=torch.float32, device="cpu"))
    indices, forced, near, thresholds, order, back = (t.zero_() for t in rest)
    places = torch.arange(tokens, dtype=torch.int64, device="cpu")
    return counts.fill_(counts.shape[-1]), indices, forced, near, thresholds, order + places, back + places


def empty_table(spec: PlanSpec, tokens: int, like: torch.Tensor) -> Table:
    """A table for a sequence of so many tokens, on the device of `like`, with nothing in it."""
    blocks, regimes = cdiv(tokens, spec.block_size), len(spec.regimes)
    counts, forced, near = (like.new_empty((regimes, 1, blocks), dtype=torch.int32) for _ in range(3))
    indices = like.new_empty((regimes, 1, blocks, blocks), dtype=torch.int32)
    thresholds = like.new_empty((regimes, 3 * len(spec.criteria)), dtype=torch.float32)
    order, back = (like.new_empty((spec.orders, tokens), dtype=torch.int64) for _ in range(2))
    return counts, indices, forced, near, thresholds, order, back


@functools.lru_cache(maxsize=16)
def _on_device(spec: str, grid: tuple[int, int, int], text_before: int, text_after: int, device: torch.device) -> Table:
    table = full_table(PlanSpec.from_json(spec), grid, text_before, text_after)
    return tuple(x.to(device) for x in table)


@torch.library.custom_op("dynamicrad::make_plan", mutates_args=())
def make_plan_op(
    like: torch.Tensor, frames: int, height: int, width: int, text_before: int, seq_len: int, spec: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table of `spec` for a grid, on `like`'s device; see `Table`."""
    text_after = seq_len - text_before - frames * height * width
    table = _on_device(spec, (frames, height, width), text_before, text_after, like.device)
    return tuple(x.clone() for x in table)  # the graph may write over them


@make_plan_op.register_fake
def _(like: torch.Tensor, frames: int, height: int, width: int, text_before: int, seq_len: int, spec: str) -> Table:
    return empty_table(PlanSpec.from_json(spec), seq_len, like)
