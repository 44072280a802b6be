"""Token orders: permutations whose runs are boxes, for any grid; and attention in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynamicrad_compile as drad
from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.order import inverse, reorder, reordered, video_order
from dynamicrad_compile.quality.blocks import masked_attention

SIZES = st.integers(1, 12)


@given(grid=st.tuples(SIZES, SIZES, SIZES), box=st.tuples(SIZES, SIZES, SIZES))
@settings(max_examples=60, deadline=None)
def test_every_token_has_one_place(grid, box):
    order = video_order(grid, box)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1] * grid[2]))


@pytest.mark.parametrize(("grid", "box"), [((16, 8, 8), (4, 2, 2)), ((16, 8, 8), (16, 1, 1)), ((4, 16, 16), (1, 4, 4))])
def test_blocks_of_a_grid_that_divides_are_its_boxes(grid, box):
    size = box[0] * box[1] * box[2]
    places = np.stack(np.unravel_index(video_order(grid, box), grid), -1).reshape(-1, size, 3)
    assert (places.max(1) - places.min(1) + 1 == box).all()
    assert (places.min(1) % box == 0).all()


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize(
    ("grid", "box"), [((21, 30, 52), (8, 4, 4)), ((13, 30, 45), (4, 4, 8)), ((5, 7, 9), (4, 2, 2))]
)
def test_blocks_of_a_ragged_grid_are_nearly_as_compact(grid, box, text):
    """The spread of their tokens is at most twice that of boxes in every axis; raster blocks have far more."""
    size = box[0] * box[1] * box[2]
    places = np.stack(np.unravel_index(video_order(grid, box), grid), -1).astype(float)
    starts = range(size - text if text else 0, len(places) - size + 1, size)
    spread = np.mean([places[start : start + size].var(0) for start in starts], axis=0)
    assert (spread <= 2.0 * (np.square(box) - 1) / 12 + 0.3).all()


def test_text_stays_at_its_ends():
    layout = Layout((4, 4, 4), 16, text_before=5, text_after=3, box=(4, 2, 2))
    order = layout.order()
    assert order[:5].tolist() == list(range(5))
    assert order[-3:].tolist() == [69, 70, 71]
    assert layout.text_blocks().tolist() == Layout((4, 4, 4), 16, 5, 3).text_blocks().tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_reordering_and_its_gradient(rows):
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(17, generator=generator) for _ in range(rows)])
    x = torch.randn(3, 2, 17, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([x[b][:, order[b % rows]] for b in range(3)])
    assert torch.equal(reordered(x, order), expected)
    assert torch.equal(reordered(reordered(x, order), inverse(order)), x)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    (found,) = torch.autograd.grad((reorder(x, order, inverse(order)) * weight).sum(), x)
    assert torch.equal(found, wanted)
    assert torch.autograd.gradgradcheck(lambda y: reorder(y, order, inverse(order)), (x,))


CASES = [
    dict(grid=(5, 7, 9), box=(4, 2, 2), text_before=5, text_after=3),
    dict(grid=(16, 8, 8), box=(16, 1, 1)),
    dict(grid=(3, 5, 4), box=(1, 4, 4), text_after=9),
    dict(grid=(6, 8, 10), box=(4, 4, 2), block_size=32, compensate=0.7),
    dict(grid=(6, 8, 10), box=(4, 4, 2), block_size=32, compensate=1.0, covariance=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_a_plan_in_boxes_is_masked_attention(case):
    case = {"block_size": 16, "sparsity": 0.6, **case}
    plan = drad.make_plan("dynamicrad", **case)
    assert plan.sparsity > 0.2
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, plan.q_len, 20, generator=generator) for _ in range(3))
    order = plan.order[0]
    doubles = [x[:, :, order].double() for x in (q, k, v)]
    weight, covariance = case.get("compensate", 0.0), case.get("covariance", False)
    expected = masked_attention(*doubles, plan.block_mask(), case["block_size"], weight, covariance=covariance)
    out, lse = drad.block_sparse_attention(q, k, v, plan, return_lse=True)
    assert (out - expected[:, :, order.argsort()]).norm() / expected.norm() < 1e-5
    raster = drad.block_sparse_attention(*(x.float() for x in doubles), _without_order(plan), return_lse=True)
    assert torch.equal(out, raster[0][:, :, order.argsort()])
    assert torch.equal(lse, raster[1][:, :, order.argsort()])


def _without_order(plan):
    from dataclasses import replace

    return replace(plan, order=None)


def test_a_key_mask_is_in_the_order_of_the_model():
    plan = drad.make_plan("dynamicrad", (3, 5, 4), 16, sparsity=0.4, box=(1, 4, 4), text_after=9)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, plan.q_len, 16, generator=generator) for _ in range(3))
    lengths = torch.tensor([plan.q_len - 7, plan.q_len])
    out = drad.block_sparse_attention(q, k, v, plan, kv_length=lengths)
    place = plan.order[0].argsort() // 16
    allowed = plan.block_mask()[0, 0][place][:, place] & (torch.arange(plan.q_len) < lengths[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed)
    assert (out - expected).norm() / expected.norm() < 1e-5


def test_regimes_with_the_same_order_share_it():
    one = drad.make_plan("dynamicrad", (4, 4, 4), 16, sparsity=0.5, box=(4, 2, 2))
    other = drad.make_plan("dynamicrad", (4, 4, 4), 16, sparsity=0.5, box=(4, 4, 1))
    raster = drad.make_plan("dynamicrad", (4, 4, 4), 16, sparsity=0.5, box="raster")
    assert drad.BlockPlan.stack([one, one]).order.shape == (1, 64)
    assert drad.BlockPlan.stack([raster, raster]).order is None
    mixed = drad.BlockPlan.stack([one, other, raster]).order
    assert mixed[2].tolist() == list(range(64))
    assert torch.equal(mixed[1], other.order[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(order=torch.zeros(1, 64, dtype=torch.int32)), "expected order int64"),
        (dict(order=torch.zeros(1, 60, dtype=torch.int64)), "expected order int64"),
        (dict(order=torch.zeros(1, 64, dtype=torch.int64)), "lists token 0 64 times"),
        (dict(order=torch.arange(64)[None], kv_len=60), r"expected order int64 \[1 or 1, 60\]"),
        (dict(q_order=torch.arange(60)[None], kv_len=60), r"expected q_order int64 \[1 or 1, 64\]"),
        (dict(q_order=torch.zeros(1, 64, dtype=torch.int64), kv_len=60), "q_order of regime 0 lists token 0 64 times"),
    ],
)
def test_wrong_orders(change, message):
    counts, indices = torch.ones(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    with pytest.raises(PlanError, match=message):
        drad.BlockPlan(counts, indices, 16, 16, **{"q_len": 64, "kv_len": 64, **change})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(box=(4, 2, 2), block_size=32), "must be block_size 32, got 4x2x2 = 16"),
        (dict(box=(4, 4)), r"box = \(4, 4\): expected \"raster\" or \[frames, height, width\]"),
        (dict(box="boxes"), "three positive integers"),
        (dict(box=(4, 0, 4)), "three positive integers"),
    ],
)
def test_wrong_boxes(params, message):
    with pytest.raises(PlanError, match=message):
        drad.make_plan("dynamicrad", (4, 4, 4), sparsity=0.5, **{"block_size": 16, **params})
