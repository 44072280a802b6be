"""Block masks as text, for terminals and where pillow is missing."""

from __future__ import annotations

import math

import numpy as np

from ..errors import PlanError
from ..plans.plan import BlockPlan

MAX_COLUMNS = 96
SHADES = ".-+#"
"""Skipped, less than half kept, at least half kept, all kept."""


def chosen_mask(plan: BlockPlan, regime: int, head: int) -> np.ndarray:
    """The mask bool [query blocks, key blocks] of one regime and head. Raises PlanError if there is no such one."""
    counts = plan.kv_counts
    for name, index, size in (("regime", regime, counts.shape[0]), ("head", head, counts.shape[1])):
        if not 0 <= index < size:
            raise PlanError(f"{name} must be in 0..{size - 1} for this plan, got {index}.")
    mask: np.ndarray = plan.block_mask()[regime, head].cpu().numpy()
    return mask


def skipped(mask: np.ndarray) -> str:
    """What a mask skips, in words."""
    return f"{1 - mask.mean():.1%} of {mask.shape[0]} x {mask.shape[1]} blocks skipped"


def average(values: np.ndarray, limit: int) -> np.ndarray:
    """Mean over tiles of equal size (the last may be smaller), so that neither of the first two sides exceeds limit."""
    for axis in (0, 1):
        size = values.shape[axis]
        tile = math.ceil(size / limit)
        starts = np.arange(0, size, tile)
        sums = np.add.reduceat(values, starts, axis=axis)
        lengths = np.diff(np.append(starts, size))
        values = sums / np.expand_dims(lengths, tuple(a for a in range(values.ndim) if a != axis))
    return values


def mask_text(plan: BlockPlan, regime: int = 0, head: int = 0, title: str | None = None) -> str:
    """The block mask of one regime and head as lines of text: rows are queries, columns keys.

    More than 96 blocks are averaged, so that one character stands for several; the last line says for how many.
    Raises PlanError if the regime or head does not exist.
    """
    mask = chosen_mask(plan, regime, head)
    shares = average(mask.astype(np.float64), MAX_COLUMNS)
    levels = np.where(shares <= 0, 0, np.where(shares >= 1, 3, np.where(shares < 0.5, 1, 2)))
    lines = ["".join(SHADES[level] for level in row) for row in levels]
    head_line = f"{title}: {skipped(mask)}" if title else skipped(mask)
    per = math.ceil(max(mask.shape) / MAX_COLUMNS)
    legend = "# read, . skipped" + (f", + and - partly; a character is {per} x {per} blocks" if per > 1 else "")
    blocks = f"{plan.block_q} x {plan.block_kv} tokens a block"
    return "\n".join([head_line, *lines, f"{legend}; {blocks}"])
