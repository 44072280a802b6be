"""dynamic_threshold in the search: which candidates the op `select_blocks` keeps, and thresholds for a budget.

`select_blocks` compares a number of each candidate with its group's threshold. Here that number is computed once for
all candidates, so the thresholds that spend a budget exactly are found by sorting instead of by trying.
"""

from __future__ import annotations

import math

import torch

from ..plans.plan import Candidates
from .sums import BlockSums

# near and far that keep every candidate.
KEEP_ALL = {"threshold": (-20.0, -20.0), "mass": (1.0, 1.0), "ratio": (1.0, 1.0)}

# Score of a block whose mean stands for it exactly, where blocks are ranked by error.
NO_ERROR = -1e300
# Levels nearer than this are not told apart: thresholds are compared in float32.
GAP = 1e-5
# Levels that are sorted to find a threshold, at most.
SORTED_LEVELS = 2_000_000


class Choice:
    """The choice for one draw and one set of candidates (P = H' = 1), in the order of tokens that both have.

    always  bool [Mq, Mk]         forced blocks and dense rows
    near, far  bool [Mq, Mk]      the two groups
    value   float64 [H, Mq, Mk]   of a candidate: log(N * p) for "threshold" (kept if it reaches the threshold), else
                                  the share of its group, by mass or by number, that is better (kept if that is below)
    """

    def __init__(self, sums: BlockSums, candidates: Candidates, criterion: str, rank: str = "mass") -> None:
        plan = candidates.plan
        blocks = plan.num_kv_blocks
        counts, indices = plan.kv_counts[0, 0], plan.kv_indices[0, 0].long()
        place = torch.arange(indices.shape[1], device="cpu")
        member = place < counts[:, None]
        forced = place < candidates.kv_forced[0, 0][:, None]
        near = (place < candidates.kv_near[0, 0][:, None]) & ~forced
        dense = counts >= blocks
        kind = torch.where(forced, 1, torch.where(near, 2, 3)).where(member, 0)
        table = torch.zeros(len(counts), blocks + 1, dtype=torch.long, device="cpu")
        table.scatter_(1, torch.where(member, indices, blocks), kind)
        table = table[:, :blocks]
        table[dense] = 1
        self.criterion = criterion
        self.always, self.near, self.far = table == 1, table == 2, table == 3
        scores = sums.errors().clamp(min=NO_ERROR) if rank == "error" else sums.scores.double()
        scores.masked_fill_(table == 0, -math.inf)
        if criterion == "threshold":
            self.value = scores.log_softmax(dim=-1) + counts.clamp(min=1).log().double()[:, None]
        else:
            share = scores.softmax(dim=-1)
            self.value = torch.zeros_like(scores)
            for group in (self.near, self.far):
                if not group.any():
                    continue
                part = share.masked_fill(~group, -1.0)
                order = part.argsort(dim=-1, descending=True, stable=True)
                weight = group.double().expand_as(share) if criterion == "ratio" else share * group
                sorted_weight = weight.gather(-1, order)
                before = sorted_weight.cumsum(-1) - sorted_weight
                total = sorted_weight.sum(-1, keepdim=True).clamp(min=1e-300)
                better = torch.empty_like(before).scatter_(-1, order, before / total)
                self.value = torch.where(group, better, self.value)

    def mask(self, near: float, far: float) -> torch.Tensor:
        """bool [H, Mq, Mk]: the blocks that are read."""
        if self.criterion == "threshold":
            kept = torch.where(self.near, self.value >= near, self.value >= far)
        else:
            kept = torch.where(self.near, self.value < near, self.value < far)
        return (kept & (self.near | self.far)) | self.always

    def levels(self, balance: float) -> torch.Tensor:
        """float64 [n]: the level (see `thresholds_of`) above which each optional candidate is kept."""
        parts = []
        for group, sign in ((self.near, 1.0), (self.far, -1.0)):
            value = self.value[group.expand_as(self.value)]
            if self.criterion == "threshold":
                parts.append(-value - sign * balance)
            else:
                parts.append(1.0 - (1.0 - value).clamp(min=0.0) ** math.exp(-sign * balance))
        return torch.cat(parts)

    @property
    def total(self) -> int:
        """Blocks of all heads, read or not."""
        return self.value.numel()

    @property
    def certain(self) -> int:
        """Blocks of all heads that are read at any threshold."""
        return int(self.always.sum()) * len(self.value)


def thresholds_of(criterion: str, level: float, balance: float) -> tuple[float, float]:
    """near and far at a level; a larger level keeps more, a larger balance shifts the budget to near blocks."""
    if criterion == "threshold":
        near, far = (min(20.0, max(-20.0, -level - sign * balance)) for sign in (1.0, -1.0))
    else:
        left = min(1.0, max(0.0, 1.0 - level))
        near, far = (1.0 - left ** math.exp(sign * balance) for sign in (1.0, -1.0))
    return round(near, 9), round(far, 9)


def fit_thresholds(choices: list[Choice], keep: float, balance: float) -> tuple[float, float]:
    """near and far at which the choices read the share `keep` of their blocks, or a little less, in the mean."""
    criterion = choices[0].criterion
    levels = [choice.levels(balance) for choice in choices]
    # Of very many levels, an even part stands for all.
    step = 1 + sum(map(len, levels)) // SORTED_LEVELS
    levels = [level[::step] for level in levels]
    weights = [level.new_full(level.shape, step / choice.total) for level, choice in zip(levels, choices, strict=True)]
    ordered, order = torch.cat(levels).sort()
    spent = torch.cat(weights)[order].cumsum(0)
    budget = keep * len(choices) - sum(choice.certain / choice.total for choice in choices)
    kept = int((spent <= budget).sum())
    if kept == len(ordered):
        return KEEP_ALL[criterion]
    # Between the first level that is too much and the next one below it; levels nearer than GAP are one.
    first = float(ordered[kept])
    below = ordered[ordered < first - GAP]
    level = (float(below[-1]) + first) / 2 if len(below) else first - GAP
    return thresholds_of(criterion, level, balance)
