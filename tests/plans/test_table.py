"""Plan tables: specifications as text, regimes in one table, shares that meet a sparsity."""

from __future__ import annotations

import pytest
import torch

from dynamicrad_compile.plans import cost
from dynamicrad_compile.plans.make import make_candidates, make_plan
from dynamicrad_compile.plans.plan import BlockPlan
from dynamicrad_compile.plans.ratios import balance_of, ratios_for, uneven
from dynamicrad_compile.plans.table import KEEP_ALL, PlanSpec, RegimeSpec
from dynamicrad_compile.profiles.parameters import StaticRatio

STATIC = RegimeSpec("low", StaticRatio(compensate=0.5, sparsity=0.8))
DYNAMIC = RegimeSpec("high", StaticRatio(sparsity=0.4), criterion="threshold", near=-0.5, far=0.5)
SPEC = PlanSpec("dynamicrad", 16, (STATIC, DYNAMIC))


def test_a_specification_survives_as_text():
    assert PlanSpec.from_json(SPEC.to_json()) == SPEC


def test_static_and_dynamic_regimes_in_one_table():
    table = SPEC.build((6, 8, 12), 5, 0)
    low, high = (
        make_plan("dynamicrad", (6, 8, 12), 16, 5, sparsity=0.8, compensate=0.5),
        make_candidates((6, 8, 12), 16, 5, sparsity=0.4),
    )
    masks = table.plan.block_mask()
    assert torch.equal(masks[0], low.block_mask()[0])
    assert torch.equal(masks[1], high.plan.block_mask()[0])
    assert torch.equal(table.candidates.kv_forced[0], low.kv_counts[0])  # all of it is kept
    assert torch.equal(table.candidates.kv_near[1], high.kv_near[0])
    assert table.thresholds.tolist() == [[KEEP_ALL["threshold"]] * 2 + [0.0], [-0.5, 0.5, 1.0]]
    assert table.plan.compensate == (0.5, 0.0)
    assert table is SPEC.build((6, 8, 12), 5, 0)


@pytest.mark.parametrize("sparsity", [0.6, 0.7, 0.8, 0.85])
@pytest.mark.parametrize("compensate", [0.0, 1.0])
def test_shares_meet_the_sparsity(sparsity, compensate):
    found = make_candidates((12, 15, 16), 32, 40, sparsity=0.4, compensate=compensate)
    near, far = ratios_for(found, sparsity)
    sizes = [found.kv_near - found.kv_forced, found.plan.kv_counts - found.kv_near]
    extra = [torch.ceil(share * size.double()) for share, size in zip((near, far), sizes, strict=True)]
    kept = found.kv_forced + sum(extra)
    kept = torch.where(found.plan.kv_counts < found.plan.num_kv_blocks, kept, found.plan.kv_counts)
    skipped = 1 - float(kept.sum()) / (kept.numel() * found.plan.num_kv_blocks) - bool(compensate) / 32
    assert skipped >= sparsity - 1e-3
    assert skipped == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize("balance", [-1.2, -0.3, 0.8, 1.2])
def test_a_balance_divides_the_shares_and_is_found_again(balance):
    found = make_candidates((12, 15, 16), 32, 40, sparsity=0.4)
    near, far = ratios_for(found, 0.8, balance)
    assert (near > far) == (balance > 0)
    assert balance_of("ratio", near, far) == pytest.approx(balance, abs=0.25)  # whole blocks are kept
    extra = torch.ceil(near * (found.kv_near - found.kv_forced).double())
    extra += torch.ceil(far * (found.plan.kv_counts - found.kv_near).double())
    kept = torch.where(found.plan.kv_counts < found.plan.num_kv_blocks, found.kv_forced + extra, found.plan.kv_counts)
    skipped = 1 - float(kept.sum()) / (kept.numel() * found.plan.num_kv_blocks)
    assert skipped == pytest.approx(0.8, abs=0.02)
    assert skipped >= 0.8


def test_balance_of_thresholds_at_the_ends():
    assert balance_of("ratio", 0.3, 0.3) == balance_of("ratio", 1.0, 1.0) == balance_of("mass", 0.9, 0.1) == 0.0
    assert balance_of("ratio", 1.0, 0.1) > 1.5
    assert balance_of("ratio", 0.0, 0.5) == -2.0


def test_shares_at_the_ends():
    found = make_candidates((6, 8, 12), 16, sparsity=0.5)
    assert ratios_for(found, 0.2) == (1.0, 1.0)
    assert ratios_for(found, 1.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("block_size", "box", "compensate"), [(64, (16, 2, 2), 1.0), (16, (4, 2, 2), 1.0), (16, (16, 1, 1), 0.0)]
)
@pytest.mark.parametrize("sparsity", [0.7, 0.8, 0.9])
@pytest.mark.parametrize("text", [0, 20])
def test_a_share_of_blocks_in_boxes_meets_the_budget_to_a_few_blocks(block_size, box, compensate, sparsity, text):
    parameters = StaticRatio(sparsity=0.0, box=box, compensate=compensate)
    regime = RegimeSpec("mid", parameters, "ratio", sparsity=sparsity, rank="error")
    table = PlanSpec("dynamicrad", block_size, (regime,)).build((16, 8, 8), text, 0)
    plan, candidates = table.plan, table.candidates
    near = float(table.thresholds[0, 0])
    thinned = plan.kv_counts < plan.num_kv_blocks
    kept = candidates.kv_forced + torch.ceil(torch.tensor(near) * (candidates.kv_near - candidates.kv_forced))
    kept = torch.where(thinned, kept, plan.kv_counts)
    forced = torch.where(thinned, candidates.kv_forced, plan.kv_counts)
    skipped, most = (
        1 - float(cost.computed(rows, compensate, plan.num_kv_blocks, block_size)) for rows in (kept, forced)
    )
    assert skipped == pytest.approx(most) or sparsity - 1e-6 <= skipped <= sparsity + 0.006
    BlockPlan(plan.kv_counts, plan.kv_indices, block_size, block_size, plan.q_len, plan.kv_len)  # ids differ
    assert int(plan.kv_counts[thinned].max() - plan.kv_counts[thinned].min()) <= 1


def test_candidates_that_differ_anyway_are_left_as_they_are():
    plan = make_candidates((16, 8, 8), 16, sparsity=0.5)
    own = torch.arange(plan.plan.num_q_blocks)
    assert uneven(plan, 0.8, own) is plan  # near and far are told apart
    boxes = make_candidates((16, 8, 8), 16, sparsity=0.03, box=(4, 2, 2))
    assert uneven(boxes, 0.995, own) is boxes  # not a block to spare
