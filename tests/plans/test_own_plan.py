"""The option `plan`: what is accepted, how it is fitted to a site, and what is said where it does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dynamicrad_compile as drad
from dynamicrad_compile.errors import OptionsError, PlanError
from dynamicrad_compile.plans.own import OwnPlan, block_size_of, checked

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SITE = ((4, 6, 10), (0, 0), 2, CPU)  # 240 tokens: 15 blocks of 16


def band(blocks=15, heads=None):
    mask = torch.ones(blocks, blocks, dtype=torch.bool).tril(2).triu(-2)
    return mask if heads is None else torch.stack([mask.roll(head, -1) for head in range(heads)])


def plan(mask=None, tokens=240, block=16, **more):
    mask = band() if mask is None else mask
    return drad.BlockPlan.from_mask(mask, block_q=block, block_kv=block, q_len=tokens, kv_len=tokens, **more)


def table(value, *site, **more):
    return OwnPlan(checked(value), **more).table(*(site or SITE))


@pytest.mark.parametrize(
    "value",
    [plan(), band(), band().numpy(), band()[None], lambda *_: band(), lambda *_: plan(), lambda *_: band().numpy()],
    ids=["plan", "mask", "array", "one head", "function", "function of plans", "function of arrays"],
)
def test_all_kinds_give_the_same_plan(value):
    found = table(value)
    assert found.plan.block_mask()[0, 0].equal(band())
    assert (found.plan.q_len, found.plan.block_q, found.criteria) == (240, 16, ())


def test_a_mask_of_every_head():
    found = table(band(heads=2)).plan
    assert found.block_mask()[0].equal(band(heads=2))
    with pytest.raises(PlanError, match=r"grid 4x6x10: the plan is for 2 heads, the attention has 4"):
        table(band(heads=2), *SITE[:2], 4, CPU)


def test_a_function_is_called_once_for_each_grid():
    calls = []

    def of_grid(grid, text_before, text_after):
        calls.append((grid, text_before, text_after))
        return drad.make_plan("radial", grid, 16, text_before, text_after)

    own = OwnPlan(of_grid)
    first, other = own.table(*SITE), own.table((4, 10, 6), (3, 5), 2, CPU)
    assert own.table(*SITE) is first is not other
    assert calls == [((4, 6, 10), 0, 0), ((4, 10, 6), 3, 5)]
    assert other.plan.q_len == 248
    assert OwnPlan(lambda *_: None).table(*SITE) is None


def test_compensation():
    assert table(band()).plan.compensate == (0.0,)
    assert table(plan(compensate=0.5)).plan.compensate == (0.5,)
    assert table(plan(compensate=0.5), compensate=0.0).plan.compensate == (0.0,)
    assert table(lambda *_: band(), compensate=1.0).plan.compensate == (1.0,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (band().float(), r"expected a BlockPlan, a bool block mask .* got torch.float32 \[15, 15\]"),
        (band().int().numpy(), r"got torch.int32 \[15, 15\]"),
        (band()[:, :14], r"got torch.bool \[15, 14\]"),
        (band()[None, None], r"got torch.bool \[1, 1, 15, 15\]"),
        (band().tolist(), "got list"),
        ("radial", "got str"),
        (band().triu(1), r"query block 14 reads no block: every row needs at least one"),
        (torch.stack([band(), band().tril(-1)]), r"query block 0 of head 1 reads no block"),
        (drad.BlockPlan.stack([plan(), plan()]), r"one regime \(P = 1\), got 2"),
    ],
    ids=[
        "float",
        "int",
        "more rows than columns",
        "rank",
        "list",
        "name",
        "empty row",
        "empty row of a head",
        "regimes",
    ],
)
def test_what_can_be_no_plan_is_refused_at_once(value, message):
    with pytest.raises(PlanError, match=message):
        checked(value)
    with pytest.raises(OptionsError, match=f"(?s)option plan = .*{message}"):
        drad.Options(plan=value)
    with pytest.raises(PlanError, match=r"grid 4x6x10"):
        table(lambda *_: value)


def test_queries_are_among_the_keys():
    wrong = drad.BlockPlan.from_mask(band()[:, :10], block_q=16, block_kv=16, q_len=240, kv_len=160)
    with pytest.raises(PlanError, match="has 240 queries and 160 keys"):
        checked(wrong)


def test_plans_of_queries_that_are_some_of_the_keys():
    asked = (80, 240)
    mask = band()[5:]
    rows = drad.BlockPlan.from_mask(mask, block_q=16, block_kv=16, q_len=160, kv_len=240)
    for value in (mask, rows, lambda grid, before, after, queries=None: rows, lambda *_, **given: mask):
        own = OwnPlan(checked(value))
        assert own.takes_queries
        found = own.table(*SITE, asked).plan
        assert (found.q_len, found.kv_len) == (160, 240)
        assert torch.equal(found.block_mask()[0, 0], mask)
    assert not OwnPlan(checked(lambda grid, before, after: rows)).takes_queries
    with pytest.raises(PlanError, match="mask of 10 x 15 blocks does not fit 240 tokens"):
        OwnPlan(mask).table(*SITE)
    with pytest.raises(PlanError, match="for 160 queries, of the sequence 240 tokens ask"):
        OwnPlan(rows).table(*SITE)
    with pytest.raises(
        PlanError, match="mask of 15 x 15 blocks does not fit 160 queries of 240 keys, which are 10 x 15"
    ):
        OwnPlan(band()).table(*SITE, asked)


def test_lengths_that_do_not_fit_are_named():
    with pytest.raises(PlanError, match=r"option plan, grid 4x6x10: the plan is for 224 tokens, the sequence has 240"):
        table(plan(band(14), tokens=224))
    with pytest.raises(PlanError, match=r"with text tokens 0 \+ 7: the plan is for 240 tokens, the sequence has 247"):
        table(plan(), (4, 6, 10), (0, 7), 2, CPU)
    with pytest.raises(PlanError, match=r"mask of 14 x 14 blocks does not fit 240 tokens, which are 15 of 16, 8 of 32"):
        table(band(14))
    with pytest.raises(PlanError, match="does not give 15 kv blocks"):
        table(band(), block_size=32)


def test_block_size_of_a_mask():
    assert [block_size_of((blocks, blocks), (240, 240)) for blocks in (15, 8, 4, 2)] == [16, 32, 64, 128]
    with pytest.raises(PlanError, match=r"may have blocks of \[64, 128, 256\] tokens: give block_size"):
        block_size_of((1, 1), (60, 60))
    assert table(torch.ones(1, 1, dtype=torch.bool), (1, 6, 10), (0, 0), 2, CPU, block_size=64).plan.block_q == 64


def test_blocks_that_the_gpu_kernels_can_not_take():
    odd = plan(band(20), block=12)
    assert table(odd).plan.block_mask()[0, 0].equal(band(20))
    assert table(odd).plan.block_q == 12
    with pytest.raises(PlanError, match=r"multiples of 16 tokens up to 256 on CUDA, got \(12, 12\)"):
        table(odd, *SITE[:3], CUDA)


def test_an_error_of_the_function_names_it_and_the_grid():
    def broken(grid, text_before, text_after):
        raise ZeroDivisionError("no frames")

    with pytest.raises(PlanError, match="function failed for grid 4x6x10: ZeroDivisionError: no frames") as caught:
        table(broken)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(PlanError, match="TypeError"):
        table(lambda grid: band())
    with pytest.raises(PlanError, match="for grid 4x6x10 the function gave str; expected a BlockPlan"):
        table(lambda *_: "radial")
    with pytest.raises(PlanError, match="does not fit 240 tokens"):
        table(lambda *_: np.ones((14, 14), dtype=bool))
