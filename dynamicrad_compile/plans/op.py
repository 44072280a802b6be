"""dynamicrad::make_plan: the plan table of a grid that is known only when the graph runs.

A graph compiled for symbolic frames, height or width can't hold its plan as a constant. It calls this op with the
sizes instead; tables are built once a grid on the host and kept, so a call costs one copy of a few small tensors.
"""

from __future__ import annotations

import functools

import torch

from ..kernels.blocks import cdiv
from .table import PlanSpec

Table = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@functools.lru_cache(maxsize=16)
def _on_device(spec: str, grid: tuple[int, int, int], text_before: int, text_after: int, device: torch.device) -> Table:
    table = PlanSpec.from_json(spec).build(grid, text_before, text_after)
    candidates = table.candidates.to(device)
    plan = candidates.plan
    indices = torch.nn.functional.pad(plan.kv_indices, (0, plan.num_kv_blocks - plan.kv_indices.shape[-1]))
    return plan.kv_counts, indices, candidates.kv_forced, candidates.kv_near, table.thresholds.to(device)


@torch.library.custom_op("dynamicrad::make_plan", mutates_args=())
def make_plan_op(
    like: torch.Tensor, frames: int, height: int, width: int, text_before: int, seq_len: int, spec: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table of `spec` for a grid, on `like`'s device, with M = ceil(seq_len / block) and P regimes.

    kv_counts int32 [P, 1, M], kv_indices int32 [P, 1, M, M], kv_forced and kv_near int32 [P, 1, M], thresholds fp32
    [P, 3 K] for K criteria.
    """
    text_after = seq_len - text_before - frames * height * width
    table = _on_device(spec, (frames, height, width), text_before, text_after, like.device)
    counts, indices, forced, near, thresholds = (x.clone() for x in table)  # the graph may write over them
    return counts, indices, forced, near, thresholds


@make_plan_op.register_fake
def _(
    like: torch.Tensor, frames: int, height: int, width: int, text_before: int, seq_len: int, spec: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    parsed = PlanSpec.from_json(spec)
    blocks, regimes = cdiv(seq_len, parsed.block_size), len(parsed.regimes)
    counts, forced, near = (like.new_empty((regimes, 1, blocks), dtype=torch.int32) for _ in range(3))
    indices = like.new_empty((regimes, 1, blocks, blocks), dtype=torch.int32)
    return counts, indices, forced, near, like.new_empty((regimes, 3 * len(parsed.criteria)), dtype=torch.float32)
