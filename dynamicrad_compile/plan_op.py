"""dynamicrad::make_plan: the plan of a grid that is known only when the graph runs.

A graph compiled for symbolic frames, height or width can't hold its plan as a constant. It calls this op with the
sizes instead; plans are built once a grid on the host and kept, so a call costs one copy of two small tensors.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch

from .plan import BlockPlan, cdiv
from .planners import make_plan


@dataclass(frozen=True)
class PlanSpec:
    """What a plan is made from, the grid apart. `params` are make_plan's, as sorted pairs."""

    pattern: str
    block_size: int
    params: tuple[tuple[str, Any], ...]

    def build(self, grid: tuple[int, int, int], text_before: int, text_after: int) -> BlockPlan:
        """The plan for a grid (frames, height, width) with text around it; built once, then remembered."""
        return _build(self, grid, text_before, text_after)

    def to_json(self) -> str:
        """The specification as text, for a graph's constant argument."""
        return json.dumps([self.pattern, self.block_size, dict(self.params)])

    @staticmethod
    def from_json(text: str) -> PlanSpec:
        """Reverse of `to_json`."""
        pattern, block_size, params = json.loads(text)
        return PlanSpec(pattern, block_size, tuple(sorted(params.items())))


@functools.lru_cache(maxsize=64)
def _build(spec: PlanSpec, grid: tuple[int, int, int], text_before: int, text_after: int) -> BlockPlan:
    return make_plan(
        spec.pattern,
        grid,
        block_size=spec.block_size,
        text_before=text_before,
        text_after=text_after,
        **dict(spec.params),
    )


@functools.lru_cache(maxsize=16)
def _on_device(
    spec: str, grid: tuple[int, int, int], text_before: int, text_after: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = PlanSpec.from_json(spec).build(grid, text_before, text_after).to(device)
    missing = plan.num_kv_blocks - plan.kv_indices.shape[-1]
    return plan.kv_counts, torch.nn.functional.pad(plan.kv_indices, (0, missing))


@torch.library.custom_op("dynamicrad::make_plan", mutates_args=())
def make_plan_op(
    like: torch.Tensor, frames: int, height: int, width: int, text_before: int, seq_len: int, spec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_counts int32 [1, 1, M] and kv_indices int32 [1, 1, M, M] on `like`'s device, M = ceil(seq_len / block)."""
    text_after = seq_len - text_before - frames * height * width
    counts, indices = _on_device(spec, (frames, height, width), text_before, text_after, like.device)
    return counts.clone(), indices.clone()  # the graph may write over what it is given


@make_plan_op.register_fake
def _(
    like: torch.Tensor, frames: int, height: int, width: int, text_before: int, seq_len: int, spec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = cdiv(seq_len, PlanSpec.from_json(spec).block_size)
    counts = like.new_empty((1, 1, blocks), dtype=torch.int32)
    return counts, like.new_empty((1, 1, blocks, blocks), dtype=torch.int32)
