"""Which share of a row's candidates a selection by "ratio" keeps, so that a target sparsity is met to the block.

The op keeps the same number of blocks in all rows that have as many candidates. A budget of 2.9 blocks a row would so
become 2: a third of what may be read would be left. `uneven` takes one candidate, the farthest, from some rows, evenly
spread; then one share gives the others a block more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from . import cost
from .plan import Candidates


def balance_of(criterion: str, near: float, far: float) -> float:
    """The balance that divides a budget as tuned thresholds do, -2 to 2; 0 unless they are shares of blocks."""
    if criterion != "ratio":
        return 0.0
    near, far = (min(1.0 - 1e-9, max(1e-9, share)) for share in (near, far))
    return min(2.0, max(-2.0, 0.5 * math.log(math.log1p(-near) / math.log1p(-far))))


def budget_of(candidates: Candidates, sparsity: float) -> float:
    """Blocks that all rows may read so that `sparsity` of dense attention is skipped, compensation counted."""
    plan = candidates.plan
    budget = (1.0 - sparsity) * plan.kv_counts.numel() * plan.num_kv_blocks
    if any(plan.compensate):
        thinned = int((plan.kv_counts < plan.num_kv_blocks).sum())
        budget -= thinned * plan.num_kv_blocks * cost.mean_keys(plan.block_kv)
    return budget


def uneven(candidates: Candidates, sparsity: float, own: torch.Tensor) -> Candidates:
    """The same candidates (P = 1, H' = 1), one less in some rows, so that a share of them can meet `sparsity` closely.

    own: int64 [Mq], each row's own block; the farthest from it are left out.

    Left as they are where rows differ anyway, where near and far blocks are told apart, and where nothing is to be had.
    """
    plan, m_k = candidates.plan, candidates.plan.num_kv_blocks
    counts, forced, near = plan.kv_counts[0, 0], candidates.kv_forced[0, 0], candidates.kv_near[0, 0]
    rows = (counts < m_k).nonzero().flatten()
    sizes = torch.stack([counts[rows], forced[rows], near[rows]], 1).unique(dim=0)
    if len(rows) == 0 or len(sizes) != 1 or sizes[0, 0] != sizes[0, 2]:
        return candidates
    size, held = int(sizes[0, 0]), int(sizes[0, 1])
    blocks = math.floor(budget_of(candidates, sparsity)) - m_k * (counts.numel() - len(rows))
    more = blocks % len(rows)
    if not more or not held < blocks // len(rows) < size - 1:
        return candidates
    turn = torch.arange(len(rows) + 1, device="cpu") * more // len(rows)
    fewer = rows[turn.diff() == 0]
    ids = plan.kv_indices[0, 0, fewer]
    away = (ids - own[fewer, None]).abs()
    away[:, :held] = -1
    away[:, size:] = -1
    places = torch.arange(ids.shape[1], device="cpu").expand_as(ids)
    last = places == ids.shape[1] - 1
    kept = places + (places >= away.argmax(1, keepdim=True))  # what is behind the farthest moves up
    ids = torch.where(last, 0, ids.gather(1, kept.clamp(max=ids.shape[1] - 1)))
    indices, fewer_counts = plan.kv_indices.clone(), plan.kv_counts.clone()
    indices[0, 0, fewer] = ids
    fewer_counts[0, 0, fewer] -= 1
    plan = replace(plan, kv_counts=fewer_counts, kv_indices=indices, check_values=False)
    return Candidates(plan, candidates.kv_forced, fewer_counts.clone(), check_values=False)


def ratios_for(candidates: Candidates, sparsity: float, balance: float = 0.0) -> tuple[float, float]:
    """Shares of the near and of the far blocks to keep, by criterion "ratio", so that `sparsity` of dense is skipped.

    The op keeps ceil(share * blocks) of a row's near and of its far blocks; compensation is counted. Near blocks get
    1 - (1 - x)^exp(balance), far ones 1 - (1 - x)^exp(-balance), with one x for all, but for rounding: equal shares at
    balance 0. 0 where the forced blocks alone are too many, 1 where all candidates are too few.
    """
    plan = candidates.plan
    thinned, budget = plan.kv_counts < plan.num_kv_blocks, budget_of(candidates, sparsity)
    near = (candidates.kv_near - candidates.kv_forced).double()
    far = (plan.kv_counts - candidates.kv_near).double()

    def fits(near_share: float, far_share: float) -> bool:
        rows = candidates.kv_forced + torch.ceil(near_share * near) + torch.ceil(far_share * far)
        return float(torch.where(thinned, rows, plan.kv_counts).sum()) <= budget

    def shares(x: float) -> tuple[float, float]:
        return 1.0 - (1.0 - x) ** math.exp(balance), 1.0 - (1.0 - x) ** math.exp(-balance)

    near_share, far_share = shares(_largest(lambda x: fits(*shares(x))))
    near_share = _largest(lambda share: fits(share, far_share), near_share)
    return near_share, _largest(lambda share: fits(near_share, share), far_share)


def _largest(fits: Callable[[float], bool], low: float = 0.0) -> float:
    """The largest number in low..1 that fits, by bisection; low where none does."""
    high = 1.0
    if fits(high):
        return high
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
