"""Block sums: the attention of any block mask, and so its error, from sums that are made once."""

from __future__ import annotations

import math

import pytest
import torch
from support.tuning import GRID

import dynamicrad_compile as drad
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.tuning.proxy import video_proxy
from dynamicrad_compile.tuning.sums import BlockSums, fewer_channels, sample_rows


def masked_attention(q, k, v, mask, block, compensate, covariance=False):
    """fp64 attention with a block mask [H', Mq, Mk], row by row, with what stands for dropped blocks."""
    q, k, v = q.double(), k.double(), v.double()
    (heads, tokens), scale = q.shape[:2], 1 / math.sqrt(q.shape[2])
    starts = range(0, tokens, block)
    out = torch.empty_like(v)
    for head in range(heads):
        parts = [(k[head, low : low + block], v[head, low : low + block]) for low in starts]
        for i, low in enumerate(starts):
            queries = q[head, low : low + block]
            kept = mask[head % len(mask), i].tolist()
            scores = [scale * queries @ keys.T for (keys, _), here in zip(parts, kept, strict=True) if here]
            values = [value.expand(len(queries), -1, -1) for (_, value), here in zip(parts, kept, strict=True) if here]
            gone = [part for part, here in zip(parts, kept, strict=True) if not here] if compensate else []
            if gone:
                growth, shift = moments(queries, gone, scale) if covariance else (1.0, 0.0)
                for keys, value in gone:
                    mass = torch.full((len(queries), 1), len(keys) * compensate, dtype=torch.float64) * growth
                    scores.append((scale * queries @ keys.mean(0))[:, None] + mass.log())
                    values.append((value.mean(0) + shift + torch.zeros_like(queries[:, :1]))[:, None])
            out[head, low : low + block] = (torch.cat(scores, 1).softmax(-1)[:, None] @ torch.cat(values, 1))[:, 0]
    return out


def moments(queries, gone, scale):
    """(1 + u [n, 1], t [n, D']) of queries [n, D] that drop blocks of (keys, values)."""
    share = torch.stack([scale * queries.mean(0) @ keys.mean(0) + math.log(len(keys)) for keys, _ in gone]).softmax(0)
    apart = [(keys - keys.mean(0), values - values.mean(0)) for keys, values in gone]
    variance = sum(s * dk.square().mean(0) for s, (dk, _) in zip(share, apart, strict=True))
    both = sum(s * dk.T @ dv / len(dk) for s, (dk, dv) in zip(share, apart, strict=True))
    growth = 1 + scale**2 / 2 * (queries.square() * variance).sum(-1, keepdim=True)
    return growth, scale * queries @ both / growth


COMPENSATIONS = [(0.0, False), (0.3, False), (1.0, False), (1.0, True), (0.4, True)]


@pytest.mark.parametrize(("compensate", "covariance"), COMPENSATIONS)
@pytest.mark.parametrize("own_masks", [False, True])
@pytest.mark.parametrize("box", [None, (2, 2, 4)], ids=["raster", "box"])
def test_block_sums_are_attention(compensate, covariance, own_masks, box):
    """Also with values of another width, a ragged end, a row that drops nothing; in another order of tokens."""
    q, k, v = video_proxy(GRID, "mid", 3, 20, seed=2, text_before=3, text_after=4)
    v = torch.cat([v, v[..., :7].flip(-1)], dim=-1)
    rows = sample_rows(q.shape[1], 50, seed=0)
    order = None if box is None else torch.from_numpy(Layout(GRID, 16, 3, 4, box).order())
    sums = BlockSums(q, k, v, 16, rows, order)
    mask = torch.rand(3 if own_masks else 1, 14, 14, generator=torch.Generator().manual_seed(1)) < 0.4
    mask |= torch.eye(14, dtype=torch.bool)
    mask[:, 5] = True

    def expected(mask, *how):
        if order is None:
            return masked_attention(q, k, v, mask, 16, *how)[:, rows]
        found = torch.empty_like(v, dtype=torch.float64)
        found[:, order] = masked_attention(q[:, order], k[:, order], v[:, order], mask, 16, *how)
        return found[:, rows]

    close = {"rtol": 2e-4, "atol": 2e-4}
    sparse = expected(mask, compensate, covariance)
    torch.testing.assert_close(sums.output(mask, compensate, covariance).double(), sparse, **close)
    dense = expected(torch.ones_like(mask), 0.0)
    torch.testing.assert_close(sums.dense.double(), dense, **close)
    error = float((sparse - dense).square().mean() / (dense.var(correction=0) + 1e-6))
    assert sums.error(mask, compensate, covariance) == pytest.approx(error, rel=1e-2)


def test_scaled_heads_with_covariances():
    """Values of one head times a number change nothing once heads are equalised."""
    q, k, v = video_proxy(GRID, "mid", 2, 20, seed=2)
    mask = torch.eye(14, dtype=torch.bool)[None]
    rows = sample_rows(q.shape[1], 50, seed=0)
    errors = []
    for size in (1.0, 30.0):
        sums = BlockSums(q, k, v * torch.tensor([1.0, size])[:, None, None], 16, rows)
        sums.equalise()
        errors.append(sums.error(mask, 1.0, True))
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_fewer_channels_keep_the_error():
    """The mean square over 256 draws of 8 signed sums is that over all channels."""
    v = torch.randn(1, 40, 20, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 21.0)
    squares = [float(fewer_channels(v, 8, seed).square().mean()) for seed in range(256)]
    assert sum(squares) / 256 == pytest.approx(float(v.square().mean()), rel=0.1)
    assert fewer_channels(v, 32, 0) is v
    assert torch.equal(fewer_channels(v, 8, 3), fewer_channels(v, 8, 3))


@pytest.mark.parametrize("box", [None, [2, 2, 4]], ids=["raster", "box"])
@pytest.mark.parametrize("compensate", [0.0, 0.6])
def test_error_is_that_of_the_op(compensate, box):
    """All rows: the objective's error is what `block_sparse_attention` gives on the same tensors."""
    q, k, v = video_proxy(GRID, "high", 2, 16, seed=3)
    plan = make_plan("dynamicrad", GRID, 16, sparsity=0.6, compensate=compensate, box=box)
    out = drad.block_sparse_attention(q[None], k[None], v[None], plan, compensate=compensate)[0]
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error = float((out - dense).square().mean() / (dense.var(correction=0) + 1e-6))
    order = None if plan.order is None else plan.order[0]
    sums = BlockSums(q, k, v, 16, sample_rows(210, None, 0), order)
    assert sums.error(plan.block_mask()[0], compensate) == pytest.approx(error, rel=1e-3)


def test_sampled_rows_are_an_unbiased_spread():
    rows = torch.stack([sample_rows(1000, 64, seed) for seed in range(300)])
    assert (rows.diff(dim=1) >= 0).all()
    assert float(rows.double().mean()) == pytest.approx(499.5, abs=1.0)
    assert torch.equal(sample_rows(1000, 64, 5), sample_rows(1000, 64, 5))
    assert torch.equal(sample_rows(10, 64, 0), torch.arange(10))
