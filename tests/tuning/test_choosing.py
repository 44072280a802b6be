"""Blocks chosen as select_blocks chooses them, and thresholds that spend the budget."""

from __future__ import annotations

import pytest
import torch
from support.tuning import GRID

import dynamicrad_compile as drad
from dynamicrad_compile.kernels.select_criteria import CRITERIA, RANKS
from dynamicrad_compile.plans.make import make_candidates, make_plan
from dynamicrad_compile.tuning import choosing
from dynamicrad_compile.tuning.choosing import Choice, fit_thresholds
from dynamicrad_compile.tuning.proxy import video_proxy
from dynamicrad_compile.tuning.sums import BlockSums, sample_rows


@pytest.mark.parametrize("box", [None, [4, 2, 2]], ids=["raster", "box"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("rank", RANKS)
def test_choice_is_that_of_select_blocks(criterion, rank, box):
    from dynamicrad_compile.kernels.select_reference import select_blocks_reference

    q, k, v = video_proxy(GRID, "mid", 2, 16, seed=5, text_after=5)
    candidates = make_candidates(GRID, 16, 0, 5, sparsity=0.3, box=box)
    order = None if box is None else candidates.plan.order[0]
    sums = BlockSums(q, k, v, 16, sample_rows(q.shape[1], 8, 0), order)
    if order is not None:
        q, k = q[:, order], k[:, order]
    for near, far in ((0.2, 0.7), (0.5, 0.31), (1.0, 0.0)):
        plan = candidates.plan
        counts, indices = select_blocks_reference(
            q[None],
            k[None],
            plan.kv_counts,
            plan.kv_indices,
            candidates.kv_forced,
            candidates.kv_near,
            torch.tensor([[near, far]]),
            None,
            16,
            16,
            criterion,
            None,
            rank,
        )
        chosen = drad.BlockPlan(counts, indices, 16, 16, 215, 215).block_mask()[0]
        assert torch.equal(Choice(sums, candidates, criterion, rank).mask(near, far), chosen)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("balance", [-1.5, 0.0, 0.7])
def test_thresholds_spend_the_budget(criterion, balance):
    choices = []
    for seed, heads in ((1, 2), (2, 4)):
        sums = BlockSums(*video_proxy((8, 8, 8), "mid", heads, 16, seed), 16, torch.arange(4))
        choices.append(Choice(sums, make_candidates((8, 8, 8), 16, sparsity=0.4), criterion))
    near, far = fit_thresholds(choices, 0.3, balance)
    kept = [float(choice.mask(near, far).float().mean()) for choice in choices]
    assert sum(kept) / 2 <= 0.3 + 1e-9
    # With "ratio" all rows with groups of one size flip together.
    assert sum(kept) / 2 > (0.2 if criterion == "ratio" else 0.295)
    assert fit_thresholds(choices, 1.0, balance) == choosing.KEEP_ALL[criterion]
    at_all = choices[0].mask(*choosing.KEEP_ALL[criterion])
    assert torch.equal(at_all[0], make_plan("dynamicrad", (8, 8, 8), 16, sparsity=0.4).block_mask()[0, 0])
