"""BlockPlan: shape checks, conversion to and from masks and PyTorch's BlockMask; make_plan's input checks."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.plans import plan as plan_module
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.plans.plan import BlockPlan


def random_mask(*shape, seed=0, density=0.3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def plan_of(mask, block_q=16, block_kv=32, q_tail=3, kv_tail=5):
    m_q, m_k = mask.shape[-2:]
    return BlockPlan.from_mask(
        mask,
        block_q=block_q,
        block_kv=block_kv,
        q_len=(m_q - 1) * block_q + q_tail,
        kv_len=(m_k - 1) * block_kv + kv_tail,
    )


@pytest.mark.parametrize("shape", [(7, 11), (3, 7, 11), (2, 3, 7, 11), (1, 1), (13, 5)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_mask_round_trip(shape, density):
    mask = random_mask(*shape, density=density)
    plan = plan_of(mask)
    assert plan.block_mask().reshape(shape).equal(mask)
    assert plan.sparsity == pytest.approx(1 - mask.float().mean().item())
    assert plan.kv_counts.dtype == plan.kv_indices.dtype == torch.int32
    assert plan.kv_indices.shape[-1] == max(1, int(mask.sum(-1).max()))


def test_ids_ascend_and_padding_is_zero():
    plan = plan_of(random_mask(2, 3, 9, 17))
    for counts, ids in zip(plan.kv_counts.flatten(), plan.kv_indices.flatten(0, 2), strict=True):
        active = ids[: int(counts)]
        assert active.equal(active.sort().values)
        assert not ids[int(counts) :].any()


def test_chunks_of_rows_do_not_change_the_plan(monkeypatch):
    mask = random_mask(2, 3, 9, 17)
    whole = plan_of(mask)
    monkeypatch.setattr(plan_module, "MASK_CHUNK", 40)
    assert plan_of(mask).kv_indices.equal(whole.kv_indices)


def test_round_trip_of_a_strided_mask():
    mask = random_mask(11, 7).T
    assert plan_of(mask).block_mask()[0, 0].equal(mask)


def test_entries_past_the_count_are_ignored():
    plan = BlockPlan(
        torch.tensor([[[1, 2]]], dtype=torch.int32),
        torch.tensor([[[[2, 2], [0, 1]]]], dtype=torch.int32),
        block_q=16,
        block_kv=16,
        q_len=32,
        kv_len=48,
    )
    assert plan.block_mask()[0, 0].tolist() == [[False, False, True], [True, True, False]]


def test_a_full_count_is_a_dense_row_whatever_its_indices():
    # A step gate makes rows dense by their count alone, also where the plan is narrower than all blocks.
    plan = BlockPlan(
        torch.tensor([[[3, 1]]], dtype=torch.int32),
        torch.tensor([[[[1], [2]]]], dtype=torch.int32),
        block_q=16,
        block_kv=16,
        q_len=32,
        kv_len=48,
    )
    expected = [[True, True, True], [False, False, True]]
    assert plan.block_mask()[0, 0].tolist() == expected
    assert plan.to_block_mask().to_dense()[0, 0].bool().tolist() == expected


@pytest.mark.parametrize("shape", [(7, 11), (2, 3, 7, 7), (1, 1, 5, 2)], ids=str)
def test_block_mask_round_trip(shape):
    plan = plan_of(random_mask(*shape))
    flex = plan.to_block_mask()
    assert flex.BLOCK_SIZE == (16, 32)
    assert flex.seq_lengths == (plan.q_len, plan.kv_len)
    assert not flex.kv_num_blocks.any(), "blocks are full: nothing is masked inside them"
    back = BlockPlan.from_block_mask(flex)
    assert back.block_mask().equal(plan.block_mask())
    assert (back.block_q, back.block_kv, back.q_len, back.kv_len) == (16, 32, plan.q_len, plan.kv_len)


def test_from_a_block_mask_that_pytorch_built():
    def band(batch, head, q, k):
        return (q - k).abs() <= 40 + 10 * head

    flex = create_block_mask(band, 1, 2, 500, 500, device="cpu", BLOCK_SIZE=(64, 64))
    plan = BlockPlan.from_block_mask(flex)
    tokens = create_mask(band, 1, 2, 512, 512, device="cpu")
    expected = tokens.reshape(1, 2, 8, 64, 8, 64).any(5).any(3)
    assert (plan.q_len, plan.block_q) == (500, 64)
    assert plan.block_mask().equal(expected)


def test_to_device_keeps_the_plan():
    plan = plan_of(random_mask(4, 4))
    moved = plan.to("cpu")
    assert moved.block_mask().equal(plan.block_mask())
    assert (moved.q_len, moved.kv_len) == (plan.q_len, plan.kv_len)


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("counts", "indices", "sizes", "message"),
    [
        (int32(1, 1, 2).long(), int32(1, 1, 2, 1), (16, 16, 32, 32), "must be int32"),
        (int32(1, 2), int32(1, 1, 2, 1), (16, 16, 32, 32), r"got \[1, 2\] and"),
        (int32(1, 1, 2), int32(1, 1, 3, 1), (16, 16, 32, 32), r"expected kv_counts \[P, H', Mq\]"),
        (int32(1, 1, 2), int32(1, 1, 2, 1), (16, 16, 0, 32), "at least 1"),
        (int32(1, 1, 2), int32(1, 1, 2, 1), (16, 16, 33, 32), "gives 3 query blocks"),
        (int32(1, 1, 2), int32(1, 1, 2, 3), (16, 16, 32, 32), "there are 2 kv blocks"),
    ],
    ids=["dtype", "rank", "shapes", "zero-length", "query-blocks", "too-wide"],
)
def test_shapes_that_do_not_fit_are_refused(counts, indices, sizes, message):
    with pytest.raises(PlanError, match=message):
        BlockPlan(counts, indices, *sizes)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 3), "expected a bool mask"),
        (torch.zeros(3, dtype=torch.bool), "expected a bool mask"),
        (torch.zeros(2, 4, dtype=torch.bool), "does not give 4 kv blocks"),
        (torch.zeros(3, 3, dtype=torch.bool), "gives 2 query blocks"),
    ],
    ids=["float", "rank", "columns", "rows"],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(PlanError, match=message):
        BlockPlan.from_mask(mask, block_q=16, block_kv=16, q_len=32, kv_len=48)


def test_dense_pattern_keeps_everything():
    plan = make_plan("dense", (3, 5, 7), 16, text_before=4, text_after=9)
    assert plan.sparsity == 0.0
    assert plan.block_mask().all()
    assert plan.q_len == plan.kv_len == 3 * 5 * 7 + 13


def test_numpy_integers_are_accepted():
    grid = np.array([2, 4, 8])
    assert make_plan("radial", grid, np.int64(16)).q_len == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "radail", "grid": (1, 2, 3)}, "unknown pattern 'radail'.*Did you mean 'radial'"),
        ({"pattern": None, "grid": (1, 2, 3)}, "unknown pattern None"),
        ({"pattern": "dense", "grid": (1, 2, 3), "sparsity": 0.5}, "it takes none"),
        ({}, "grid must be three positive integers.*got None"),
        ({"grid": (1, 2)}, "three positive integers"),
        ({"grid": (1, 0, 2)}, "three positive integers"),
        ({"grid": (1, 2.0, 2)}, "three positive integers"),
        ({"grid": (True, 2, 2)}, "three positive integers"),
        ({"grid": "21x45x80"}, "three positive integers"),
        ({"grid": (1, 2, 3), "block_size": 100}, r"one of \[16, 32, 64, 128, 256\], got 100"),
        ({"grid": (1, 2, 3), "block_size": "128"}, "block_size must be one of"),
        ({"grid": (1, 2, 3), "text_before": -1}, "text_before must be an integer of at least 0, got -1"),
        ({"grid": (1, 2, 3), "text_after": 1.5}, "text_after must be an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(PlanError, match=message):
        make_plan(**arguments)
