"""Dealing heads and rows: equal numbers, nearly equal work, never worse than brute force allows, clear errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import dynamicrad_compile as drad
from dynamicrad_compile import PlanError
from dynamicrad_compile.parallel.balance import (
    active_blocks,
    bounds,
    deal_heads,
    deal_rows,
    imbalance,
    token_costs,
    work,
)

GRID = (21, 30, 52)
STATIC = {
    "radial": ("radial", {}),
    "dynamicrad": ("dynamicrad", {"sparsity": 0.8}),
    "dynamicrad in boxes": ("dynamicrad", {"sparsity": 0.8, "box": (4, 4, 8)}),
    "lvsa": ("lvsa", {"reference_frames": 9}),
}


def least_imbalance(costs, ranks):
    """The slow obvious reference: every way of dealing."""
    sizes, best = np.diff(bounds(len(costs), ranks)).tolist(), [np.inf]

    def deal(left, sizes, most):
        if not sizes:
            best[0] = min(best[0], most)
            return
        for hand in itertools.combinations(left, sizes[0]):
            deal([i for i in left if i not in hand], sizes[1:], max(most, costs[list(hand)].sum()))

    deal(range(len(costs)), sizes, 0.0)
    return best[0] * ranks / costs.sum() - 1.0


@pytest.mark.parametrize("seed", range(40))
def test_near_brute_force(seed):
    generator = np.random.default_rng(seed)
    items = int(generator.integers(2, 9))
    ranks = int(generator.integers(1, min(items, 4) + 1))
    costs = generator.integers(0, 20, items) + 0.5 if seed % 2 else generator.exponential(1.0, items)
    order = deal_rows(costs, ranks)
    assert sorted(order) == list(range(items))
    least, found = least_imbalance(costs, ranks), imbalance(work(costs, ranks, order))
    assert least - 1e-9 <= found <= max(0.01, 1.05 * (1 + least) - 1)
    assert found <= imbalance(work(costs, ranks)) + 1e-12
    if items % ranks == 0:
        assert (deal_heads(costs, ranks) == order).all()


def test_by_hand():
    costs = [8.0, 7.0, 1.0, 2.0, 3.0, 3.0]
    assert work(costs, 2).tolist() == [16.0, 8.0]
    assert imbalance([16.0, 8.0]) == pytest.approx(1 / 3)
    assert sorted(work(costs, 2, deal_heads(costs, 2)).tolist()) == [12.0, 12.0]
    assert bounds(7, 3).tolist() == [0, 3, 5, 7]
    assert work(np.ones(7), 3).tolist() == [3.0, 2.0, 2.0]
    # 5 rows on 2 ranks: the rank with the great one has two
    assert sorted(work([9, 3, 3, 3, 3], 2, deal_rows([9, 3, 3, 3, 3], 2)).tolist()) == [9.0, 12.0]


def test_equal_costs_stay_as_they_come():
    assert deal_heads(torch.full((40,), 3.0), 8).tolist() == list(range(40))
    assert deal_rows(np.zeros(5), 2).tolist() == list(range(5))
    assert deal_rows([5.0, 1.0, 2.0], 1).tolist() == [0, 1, 2]
    assert imbalance([0.0, 0.0]) == 0.0


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("name", STATIC)
def test_static_plans_within_five_percent(name, ranks):
    pattern, settings = STATIC[name]
    plan = drad.make_plan(pattern, grid=GRID, block_size=128, **settings)
    rows = active_blocks(plan)[0, 0]
    assert 0.4 < plan.sparsity < 0.9
    assert imbalance(work(rows, ranks, deal_rows(rows, ranks))) < 0.05


def test_contiguous_shards_of_a_radial_plan_are_unequal():
    """Dealt to any number of ranks they are equal."""
    rows = active_blocks(drad.make_plan("radial", grid=GRID, block_size=128))[0, 0]
    for ranks in range(2, 65):
        assert imbalance(work(rows, ranks, deal_rows(rows, ranks))) < 0.05
    assert imbalance(work(rows, 8)) > 0.09
    assert imbalance(work(rows, 64)) > 0.11


def test_a_partial_row_counts_by_its_tokens():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    plan = drad.BlockPlan.from_mask(mask, block_q=4, block_kv=4, q_len=9, kv_len=9)
    assert active_blocks(plan).tolist() == [[[2.0, 2.0, 0.75]]]
    assert token_costs(plan)[0, 0].tolist() == [0.5] * 8 + [0.75]


def test_costs_of_tokens_follow_the_order_of_the_queries():
    plan = drad.make_plan("dynamicrad", grid=(6, 7, 9), block_size=16, sparsity=0.7, box=(4, 2, 2), text_after=5)
    costs, order = token_costs(plan)[0, 0], plan.order[0].numpy()
    for place in range(0, plan.q_len, 13):
        assert costs[order[place]] == plan.kv_counts[0, 0, place // 16] / 16
    assert costs.sum() == pytest.approx(active_blocks(plan).sum())


MISTAKES = {
    "not divisible": (deal_heads, np.ones(40), 16, "40 heads can't be divided among 16 ranks"),
    "more ranks": (deal_rows, np.ones(3), 4, "3 rows can be dealt to 1..3 ranks, got 4"),
    "no rank": (deal_rows, np.ones(3), 0, "got 0"),
    "negative": (deal_rows, [1.0, -1.0], 2, "finite and at least 0"),
    "nan": (deal_heads, [1.0, float("nan")], 2, "finite and at least 0"),
    "shape": (deal_heads, np.ones((2, 2)), 2, r"got shape \[2, 2\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    deal, costs, ranks, text = MISTAKES[name]
    with pytest.raises(PlanError, match=text):
        deal(costs, ranks)
