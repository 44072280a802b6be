"""Block sums: the attention of any block mask, and so its error, from sums that are made once."""

from __future__ import annotations

import math

import pytest
import torch
from support.tuning import GRID

import dynamicrad_compile as drad
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.tuning.proxy import video_proxy
from dynamicrad_compile.tuning.sums import BlockSums, sample_rows


def masked_attention(q, k, v, mask, block, compensate):
    """fp64 attention with a block mask, dropped blocks represented by their means; mask [H', Mq, Mk]."""
    q, k, v = q.double(), k.double(), v.double()
    _, tokens, dim = q.shape
    spread = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :tokens, :tokens]
    logits = (q @ k.transpose(1, 2) / math.sqrt(dim)).masked_fill(~spread, -math.inf)
    values = v
    if compensate:
        parts = [(k[:, low : low + block], v[:, low : low + block]) for low in range(0, tokens, block)]
        counts = torch.tensor([part[0].shape[1] for part in parts]).double()
        k_mean, v_mean = (torch.stack([part[i].mean(1) for part in parts], dim=1) for i in (0, 1))
        pooled = q @ k_mean.transpose(1, 2) / math.sqrt(dim) + counts.log() + math.log(compensate)
        dropped = ~mask.repeat_interleave(block, 1)[:, :tokens]
        logits = torch.cat([logits, pooled.masked_fill(~dropped, -math.inf)], dim=2)
        values = torch.cat([v, v_mean], dim=1)
    return logits.softmax(dim=-1) @ values


@pytest.mark.parametrize("compensate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("own_masks", [False, True])
def test_block_sums_are_attention(compensate, own_masks):
    q, k, v = video_proxy(GRID, "mid", 3, 20, seed=2, text_before=3, text_after=4)
    rows = sample_rows(q.shape[1], 50, seed=0)
    sums = BlockSums(q, k, v, 16, rows)
    mask = torch.rand(3 if own_masks else 1, 14, 14, generator=torch.Generator().manual_seed(1)) < 0.4
    mask |= torch.eye(14, dtype=torch.bool)
    expected = masked_attention(q, k, v, mask, 16, compensate)[:, rows]
    torch.testing.assert_close(sums.output(mask, compensate).double(), expected, rtol=2e-4, atol=2e-4)
    dense = masked_attention(q, k, v, torch.ones_like(mask), 16, 0.0)[:, rows]
    torch.testing.assert_close(sums.dense.double(), dense, rtol=2e-4, atol=2e-4)
    error = float((expected - dense).square().mean() / (dense.var(correction=0) + 1e-6))
    assert sums.error(mask, compensate) == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("compensate", [0.0, 0.6])
def test_error_is_that_of_the_op(compensate):
    """All rows: the objective's error is what `block_sparse_attention` gives on the same tensors."""
    q, k, v = video_proxy(GRID, "high", 2, 16, seed=3)
    plan = make_plan("dynamicrad", GRID, 16, sparsity=0.6, compensate=compensate)
    out = drad.block_sparse_attention(q[None], k[None], v[None], plan, compensate=compensate)[0]
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error = float((out - dense).square().mean() / (dense.var(correction=0) + 1e-6))
    sums = BlockSums(q, k, v, 16, sample_rows(210, None, 0))
    assert sums.error(plan.block_mask()[0], compensate) == pytest.approx(error, rel=1e-3)


def test_sampled_rows_are_an_unbiased_spread():
    rows = torch.stack([sample_rows(1000, 64, seed) for seed in range(300)])
    assert (rows.diff(dim=1) >= 0).all()
    assert float(rows.double().mean()) == pytest.approx(499.5, abs=1.0)
    assert torch.equal(sample_rows(1000, 64, 5), sample_rows(1000, 64, 5))
    assert torch.equal(sample_rows(10, 64, 0), torch.arange(10))
