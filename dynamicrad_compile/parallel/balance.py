"""Which rank gets which heads and rows of a plan, so that all have as much to do.

Heads and rows are dealt in equal numbers, since tensors are sharded in equal parts. Equal numbers of unequal rows are
unequal work: contiguous shards of a radial plan over 21 x 30 x 52 differ by 8 to 12 %.

The deal is LPT (longest processing time first: R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969) with
a limit of items a rank, and then swaps of the heaviest rank with others for as long as they help. How near it comes is
up to the costs: 40 equal heads can't be dealt to 16 ranks, nor 5 rows evenly to 4.
"""

from __future__ import annotations

import heapq
from typing import TypeAlias

import numpy as np
import torch

from ..errors import PlanError
from ..plans.plan import BlockPlan

WITHIN = 0.01
"""Ranks whose heaviest has at most so much more than the mean are equal: nothing is moved any more."""

Costs: TypeAlias = np.ndarray | torch.Tensor


def active_blocks(plan: BlockPlan) -> np.ndarray:
    """float64 [P, H', Mq]: blocks that each row reads; a partial row counts by the share of its tokens."""
    counts = plan.kv_counts.cpu().numpy().astype(np.float64)
    counts[..., -1] *= (plan.q_len - (plan.num_q_blocks - 1) * plan.block_q) / plan.block_q
    return counts


def token_costs(plan: BlockPlan, counts: np.ndarray | None = None) -> np.ndarray:
    """float64 [P, H', q_len]: each query's part of the active blocks of its row, in the model's order of tokens.

    counts  float64 [P, H', Mq]: blocks of each whole row; None: the plan's
    """
    counts = plan.kv_counts.cpu().numpy() if counts is None else counts
    costs = np.repeat(counts / plan.block_q, plan.block_q, axis=-1)[..., : plan.q_len]
    if plan.query_order is None:
        return costs
    placed = np.empty_like(costs)
    for number, regime in enumerate(costs):
        order = plan.query_order[min(number, len(plan.query_order) - 1)].cpu().numpy()
        placed[number][:, order] = regime
    return placed


def bounds(items: int, ranks: int) -> np.ndarray:
    """int64 [ranks + 1]: where each rank's slice begins and ends; the first `items % ranks` have one more."""
    rank = np.arange(ranks + 1, dtype=np.int64)
    return rank * (items // ranks) + np.minimum(rank, items % ranks)


def work(costs: Costs, ranks: int, order: np.ndarray | None = None) -> np.ndarray:
    """float64 [..., ranks]: sums of costs [..., items] over each rank's slice of `order` (None: as they come).

    Raises PlanError if there are fewer items than ranks.
    """
    costs = np.asarray(costs, dtype=np.float64)
    _check_ranks(costs.shape[-1], ranks, "items")
    ordered = costs if order is None else costs[..., order]
    return np.add.reduceat(ordered, bounds(costs.shape[-1], ranks)[:-1], axis=-1)


def imbalance(costs: Costs) -> float:
    """max / mean - 1 over the last axis of costs [..., ranks], the worst of the others; 0 where there is no work."""
    costs = np.asarray(costs, dtype=np.float64)
    mean = costs.mean(-1)
    return float((costs.max(-1) / np.where(mean > 0, mean, np.inf)).max(initial=1.0)) - 1.0


def deal_heads(costs: Costs, ranks: int) -> np.ndarray:
    """int64 [H]: an order of the heads whose contiguous slices of H / ranks have nearly equal work.

    costs  [H], at least 0: work of each head. As they come where that is within WITHIN already.
    Raises PlanError if the heads can't be divided among the ranks, or a cost is negative or not finite.
    """
    costs = _checked(costs, ranks, "heads")
    if len(costs) % ranks:
        raise PlanError(
            f"{len(costs)} heads can't be divided among {ranks} ranks: each needs as many. "
            f"Take a number of ranks that divides {len(costs)}, and a ring for the rest."
        )
    return _deal(costs, ranks)


def deal_rows(costs: Costs, ranks: int) -> np.ndarray:
    """int64 [rows]: an order of the rows of blocks whose slices (`bounds`) have nearly equal work.

    For sharding of one's own, where each rank may have any rows; their numbers differ by one at most.
    costs  [rows], at least 0: active blocks of each row. As they come where that is within WITHIN already.
    Raises PlanError if there are fewer rows than ranks, or a cost is negative or not finite.
    """
    return _deal(_checked(costs, ranks, "rows"), ranks)


def _checked(costs: Costs, ranks: int, what: str) -> np.ndarray:
    costs = np.asarray(costs, dtype=np.float64)
    if costs.ndim != 1:
        raise PlanError(f"expected the costs of {what} as one dimension, got shape {list(costs.shape)}.")
    if not np.isfinite(costs).all() or (costs < 0).any():
        raise PlanError(f"the costs of {what} must be finite and at least 0.")
    _check_ranks(len(costs), ranks, what)
    return costs


def _check_ranks(items: int, ranks: int, what: str) -> None:
    if not 1 <= ranks <= items:
        raise PlanError(f"{items} {what} can be dealt to 1..{items} ranks, got {ranks}. Take fewer ranks.")


def _deal(costs: np.ndarray, ranks: int) -> np.ndarray:
    """An order of the items; the one that they have, unless another is more even."""
    order = np.arange(len(costs), dtype=np.int64)
    before = imbalance(work(costs, ranks))
    if before <= WITHIN:
        return order
    hands = _longest_first(costs, ranks)
    _even_out(costs, hands)
    hands.sort(key=len, reverse=True)  # as `bounds` has it
    dealt = np.concatenate([np.sort(hand) for hand in hands])
    return dealt if imbalance(work(costs, ranks, dealt)) < before else order


def _longest_first(costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Items of each rank: the costliest left goes to the rank with the least work that may still take one."""
    least, more = divmod(len(costs), ranks)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    waiting = [(0.0, rank) for rank in range(ranks)]
    for item in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(waiting)
        while len(hands[rank]) == least and not more:  # all that may have one more have it
            load, rank = heapq.heappop(waiting)
        more -= len(hands[rank]) == least
        hands[rank].append(item)
        if len(hands[rank]) <= least:
            heapq.heappush(waiting, (load + float(costs[item]), rank))
    return [np.array(hand, dtype=np.int64) for hand in hands]


def _even_out(costs: np.ndarray, hands: list[np.ndarray]) -> None:
    """Swap items of the heaviest rank for smaller ones of others, in place, while that helps."""
    loads = np.array([costs[hand].sum() for hand in hands])
    for _ in range(len(costs)):
        heavy = int(loads.argmax())
        if imbalance(loads) <= WITHIN:
            return
        for light in loads.argsort(kind="stable").tolist():  # all ranks find the same, on any processor
            swap = _best_swap(costs, hands[heavy], hands[light], float(loads[heavy] - loads[light]))
            if swap is not None:
                hands[heavy], hands[light] = swap
                loads[[heavy, light]] = costs[hands[heavy]].sum(), costs[hands[light]].sum()
                break
        else:
            return


def _best_swap(
    costs: np.ndarray, heavy: np.ndarray, light: np.ndarray, gap: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Both ranks after the swap that brings them nearest to each other; None if none does.

    A rank that has one item more may also give one for nothing.
    """
    light = light[np.argsort(costs[light], kind="stable")]
    offered = costs[light]
    if len(heavy) > len(light):
        offered = np.append(0.0, offered)
    ideal = costs[heavy] - gap / 2
    place = np.searchsorted(offered, ideal)
    pairs = np.clip(np.stack([place - 1, place]), 0, len(offered) - 1)
    moved = costs[heavy] - offered[pairs]  # [2, items]
    useful = (moved > 1e-9 * gap) & (moved < (1 - 1e-9) * gap)
    if not useful.any():
        return None
    which, item = np.unravel_index(np.where(useful, abs(moved - gap / 2), np.inf).argmin(), moved.shape)
    other = int(pairs[which, item]) - (len(offered) - len(light))
    kept = np.delete(heavy, item)
    if other < 0:
        return kept, np.append(light, heavy[item])
    return np.append(kept, light[other]), np.append(np.delete(light, other), heavy[item])
