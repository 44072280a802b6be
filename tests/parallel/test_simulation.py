"""A step on many GPUs, on paper: each figure by hand for tiny cases, all layouts to 64 ranks, groups, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from suite.estimate import RATES
from suite.machine import peak_of

import dynamicrad_compile as drad
from dynamicrad_compile import OptionsError
from dynamicrad_compile.parallel.attentions import attentions_of, expected_counts
from dynamicrad_compile.parallel.chips import CHIPS
from dynamicrad_compile.plans.crossover import expected_gain
from dynamicrad_compile.reporting.report import GraphReport, Report, SiteReport, TextTokens

GRID, TOKENS = (21, 30, 52), 32760


def site(shape, keys, plan=None, role="video_self_attention", **values):
    sparsity = values.pop("sparsity", 0.0 if plan is None else plan.sparsity)
    replaced = values.pop("replaced", plan is not None)
    return SiteReport(
        role, replaced, "", None, TextTokens(0, 0), shape, keys, sparsity, "blocks.0", plan=plan, **values
    )


def report(*sites):
    return Report([GraphReport(list(sites), [], {})])


def layout(found, ulysses, ring, dealt=False):
    return next(one for one in found.layouts if (one.ulysses, one.ring, one.dealt) == (ulysses, ring, dealt))


def test_every_figure_by_hand():
    """8 tokens in blocks of 2, two heads of 4 features, two layers; the first half of the rows reads thrice as much."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    plan = drad.BlockPlan.from_mask(mask, block_q=2, block_kv=2, q_len=8, kv_len=8)
    found = drad.simulate_ranks(report(*2 * [site((1, 2, 8, 4), 8, plan)]), 2, link=100, rest_flops=1e9)
    chip = CHIPS["h100"]
    dense = 2 * 4 * 2 * 8 * 8 * 4 / (0.42 * 989e12) * 1e3  # two layers, head_dim 64 or less
    sparse = dense / expected_gain("sm_90", 8, 0.5, 4).ratio
    rest = 1e9 / (0.75 * 989e12) * 1e3
    assert (found.chip, found.link, found.left_out) == (chip, 100.0, 0)
    assert found.dense_ms == pytest.approx(dense + rest)
    assert found.sparse_ms == pytest.approx(sparse + rest)
    assert [one.name for one in found.layouts] == ["ulysses 2", "ring 2", "ring 2, dealt"]

    ulysses, ring, dealt = found.layouts
    # q, k, v and output are 8 x 2 x 4 numbers of 2 bytes each: 128 bytes
    assert ulysses.moved_bytes == 2 * 4 * 128 // 2 // 2  # a half of them, of which a half leaves
    assert ulysses.memory_bytes == 4 * 128 // 2
    assert (ulysses.blocks_min, ulysses.blocks_mean, ulysses.blocks_max) == (
        16,
        16,
        16,
    )  # 2 layers x 8 blocks, one head
    assert ulysses.imbalance == 0
    assert ring.moved_bytes == 2 * 2 * 128 // 2  # keys and values, of which a half comes from the other
    assert ring.memory_bytes == 4 * 128 // 2 + 2 * 128
    assert (ring.blocks_min, ring.blocks_mean, ring.blocks_max) == (8, 16, 24)  # 2 layers x 2 heads x (2, 6) blocks
    assert ring.imbalance == pytest.approx(0.5)
    assert (dealt.blocks_min, dealt.blocks_max, dealt.imbalance) == (16, 16, 0)

    for one in found.layouts:
        assert one.attention_ms == pytest.approx(sparse / 2 * (1 + one.imbalance))
        assert one.moving_ms == pytest.approx(one.moved_bytes / 100e9 * 1e3)
        assert one.rest_ms == pytest.approx(rest / 2)
        assert one.step_ms == pytest.approx(one.attention_ms + one.moving_ms + one.rest_ms)
        assert one.over_dense == pytest.approx(found.dense_ms / one.step_ms)
        assert one.over_sparse == pytest.approx(found.sparse_ms / one.step_ms)
    assert found.best is ulysses


def test_ulysses_and_ring_together():
    plan = drad.make_plan("radial", grid=GRID, block_size=128)
    one = layout(drad.simulate_ranks(report(site((2, 40, TOKENS, 128), TOKENS, plan)), 8), 4, 2)
    token = 2 * 40 * 128 * 2  # a batch of two, 2 bytes a number
    own = 4 * TOKENS * token / 8
    assert one.moved_bytes == pytest.approx(own * 3 / 4 + 2 * TOKENS * token / 4 / 2, abs=1)
    assert one.memory_bytes == pytest.approx(own + 2 * TOKENS * token / 4, abs=1)
    assert one.blocks_mean * 8 == pytest.approx(2 * 40 * (float(plan.kv_counts.sum()) - (1 - 120 / 128) * 70), rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2, 6, 7, 40, 64])
def test_all_layouts_of_a_number_of_ranks(ranks):
    plan = drad.make_plan("radial", grid=GRID, block_size=128)
    found = drad.simulate_ranks(report(*3 * [site((1, 40, TOKENS, 128), TOKENS, plan)]), ranks)
    plain = [(one.ulysses, one.ring) for one in found.layouts if not one.dealt]
    assert plain == [(u, ranks // u) for u in range(ranks, 0, -1) if ranks % u == 0 and 40 % u == 0]
    for one in found.layouts:
        assert not one.dealt or one.imbalance < layout(found, one.ulysses, one.ring).imbalance
        if one.dealt:
            assert one.imbalance < 0.05
        elif one.ring == 1:
            assert one.imbalance < 1e-9  # one row of a plan for all heads: they cost the same
    text = str(found)
    assert text.count("estimated") >= 2
    assert text.count("<- fastest as it is") == (len(found.layouts) > 1)


def test_unequal_heads_are_dealt():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 8, 10, 10, generator=generator) < torch.arange(1, 9)[None, :, None, None] / 8
    plan = drad.BlockPlan.from_mask(mask, block_q=16, block_kv=16, q_len=150, kv_len=150)
    found = drad.simulate_ranks(report(site((1, 8, 150, 64), 150, plan)), 4)
    counts = plan.kv_counts[0].double()
    counts[:, -1] *= 6 / 16  # the last row has 6 tokens
    by_rank = counts.sum(-1).unflatten(0, (4, 2)).sum(-1)
    assert layout(found, 4, 1).imbalance == pytest.approx(float(by_rank.max() / by_rank.mean()) - 1)
    assert layout(found, 4, 1).imbalance > 0.5
    assert layout(found, 4, 1, dealt=True).imbalance < 0.05
    assert layout(found, 2, 2, dealt=True).imbalance < layout(found, 2, 2).imbalance


def test_the_worst_regime_counts():
    even = torch.ones(4, 4, dtype=torch.bool)
    masks = torch.stack([even, torch.tensor([4, 4, 1, 1])[:, None] > torch.arange(4)])[:, None]
    plan = drad.BlockPlan.from_mask(masks, block_q=8, block_kv=8, q_len=32, kv_len=32)
    ring = layout(drad.simulate_ranks(report(site((1, 1, 32, 64), 32, plan)), 2), 1, 2)
    assert ring.imbalance == pytest.approx(8 / 5 - 1)


def test_groups_of_queries_have_their_own_work():
    """A causal mask of two groups: the first half reads itself, the second everything."""
    whole = drad.make_plan("dense", grid=(4, 4, 4), block_size=16, queries=(32, 64))
    half = drad.make_plan("dense", grid=(2, 4, 4), block_size=16)
    chunks = (
        site((1, 2, 32, 64), 32, half, asks=(0, 32)),
        site((1, 2, 32, 64), 64, whole, asks=(32, 64)),
    )
    causal = site((1, 2, 64, 64), 64, replaced=True, sparsity=0.25, chunks=chunks)
    found = drad.simulate_ranks(report(causal), 2)
    assert layout(found, 1, 2).imbalance == pytest.approx(4 / 3 - 1)  # 2 x 2 and 2 x 4 blocks
    assert layout(found, 2, 1).imbalance == 0


def test_blocks_chosen_at_run_time():
    """Rows keep a share of their candidates, so that the expected sparsity comes out; text keeps all."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    plan = drad.BlockPlan.from_mask(mask, block_q=8, block_kv=8, q_len=32, kv_len=32)
    assert expected_counts(plan, plan.sparsity)[0, 0].tolist() == [3, 2, 3, 4]
    assert expected_counts(plan, 0.5)[0, 0].tolist() == pytest.approx([1.5, 1, 1.5, 4])
    assert expected_counts(plan, 0.875)[0, 0].tolist() == pytest.approx([0.5, 1 / 3, 0.5, 2 / 3])
    every = drad.BlockPlan.from_mask(torch.ones_like(mask), block_q=8, block_kv=8, q_len=32, kv_len=32)
    assert expected_counts(every, 0.75)[0, 0].tolist() == [1, 1, 1, 1]


def test_prompts_are_divided_and_move_nothing():
    video = site((1, 8, 256, 64), 256)
    prompt = site((1, 8, 256, 64), 77, role="cross_attention")
    unknown = site(None, None)
    alone, both = (drad.simulate_ranks(report(*sites), 4) for sites in ([video], [video, prompt, unknown]))
    assert both.left_out == 1
    assert "left out: 1 " in str(both)
    for before, after in zip(alone.layouts, both.layouts, strict=True):
        assert (before.moved_bytes, before.memory_bytes) == (after.moved_bytes, after.memory_bytes)
        assert after.attention_ms == pytest.approx(before.attention_ms * (1 + 77 / 256))


def test_sites_alike_are_looked_at_once():
    plan = drad.make_plan("radial", grid=GRID, block_size=128)
    (found,) = attentions_of([site((1, 40, TOKENS, 128), TOKENS, plan)] * 3)
    assert found.count == 3
    assert found.rows()[0, 0] == pytest.approx(
        np.append(plan.kv_counts[0, 0, :-1], plan.kv_counts[0, 0, -1] * 120 / 128)
    )


def test_rates_are_those_of_the_benchmarks():
    for chip in CHIPS.values():
        assert (chip.tensor, chip.dense) == (peak_of(chip.name).tensor, RATES[chip.arch].dense)


MISTAKES = {
    "65 ranks": (dict(ranks=65), "1..64, got 65"),
    "no ranks": (dict(ranks=0), "1..64, got 0"),
    "half": (dict(ranks=2.5), "integer in 1..64, got 2.5"),
    "link": (dict(ranks=2, link=0), "positive number of GB/s, got 0"),
    "infinite link": (dict(ranks=2, link=float("inf")), "positive number of GB/s"),
    "device": (dict(ranks=2, device="h10"), "Did you mean 'h100'"),
    "rest": (dict(ranks=2, rest_flops=-1), "at least 0, got -1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    arguments, text = MISTAKES[name]
    with pytest.raises(OptionsError, match=text):
        drad.simulate_ranks(report(site((1, 8, 256, 64), 256)), **arguments)


def test_nothing_to_simulate():
    with pytest.raises(OptionsError, match="no softmax attention over a video"):
        drad.simulate_ranks(report(site((1, 8, 256, 64), 77, role="cross_attention")), 2)


def test_more_ranks_than_tokens():
    with pytest.raises(OptionsError, match="64 ranks are more than"):
        drad.simulate_ranks(report(site((1, 2, 16, 64), 16)), 64)
