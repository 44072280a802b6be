"""BlockPlan: shape checks, conversion to and from masks and PyTorch's BlockMask; make_plan's input checks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.plans import plan as plan_module
from dynamicrad_compile.plans.attention import block_sparse_attention
from dynamicrad_compile.plans.make import make_candidates, make_plan
from dynamicrad_compile.plans.plan import BlockPlan, Candidates
from dynamicrad_compile.plans.selection import select_blocks


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
        torch.tensor([[[[9], [2]]]], dtype=torch.int32),
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
        (int32(1, 1, 2), int32(1, 1, 2, 1), (16, 16, 0, 32), "q_len must be an integer of at least 1, got 0"),
        (int32(1, 1, 2), int32(1, 1, 2, 1), (16, 16, 33, 32), "gives 3 query blocks"),
        (int32(1, 1, 2), int32(1, 1, 2, 3), (16, 16, 32, 32), "there are 2 kv blocks"),
    ],
    ids=["dtype", "rank", "shapes", "zero-length", "query-blocks", "too-wide"],
)
def test_shapes_that_do_not_fit_are_refused(counts, indices, sizes, message):
    with pytest.raises(PlanError, match=message):
        BlockPlan(counts, indices, *sizes)


def rows(*values):
    return torch.tensor(values, dtype=torch.int32)[None, None]


@pytest.mark.parametrize(
    ("counts", "indices", "message"),
    [
        (rows(1, -2), rows([0, 1], [0, 1]), r"kv_counts of query block 1 is -2; expected 0\.\.2, .* or 4, all blocks"),
        (rows(5, 1), rows([0, 1], [0, 1]), "kv_counts of query block 0 is 5"),
        (rows(3, 1), rows([0, 1], [0, 1]), "kv_counts of query block 0 is 3"),
        (rows(1, 2), rows([0, 9], [0, 4]), r"query block 1 lists block 4 at place 1; expected ids in 0\.\.3"),
        (rows(2, 2), rows([1, -7], [0, 1]), "query block 0 lists block -7 at place 1"),
        (rows(2, 3), rows([0, 1, 9], [2, 0, 2]), "kv_indices of query block 1 lists block 2 twice"),
        (rows(1, 1).expand(1, 2, 2), torch.cat([rows([0], [1]), rows([0], [4])], 1), "block 1 of head 1 lists"),
        (torch.cat([rows(1, 1), rows(1, 9)]), torch.cat([rows([0], [1])] * 2), "block 1 in regime 1 is 9"),
    ],
    ids=["negative", "beyond", "wider", "id beyond", "negative id", "twice", "head", "regime"],
)
def test_wrong_values_are_named(counts, indices, message):
    with pytest.raises(PlanError, match=message):
        BlockPlan(counts, indices, 16, 16, 32, 64)
    unseen = BlockPlan(counts, indices, 16, 16, 32, 64, check_values=False)
    with pytest.raises(PlanError, match=message):
        replace(unseen, q_len=31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_counts": [[[1, 1]]]}, "kv_counts must be a tensor, got list"),
        ({"kv_counts": int32(1, 1, 2).to("meta")}, "on one device, got {'kv_counts': 'meta', 'kv_indices': 'cpu'}"),
        ({"kv_counts": int32(0, 1, 2), "kv_indices": int32(0, 1, 2, 1)}, "a regime, a head and a row at least"),
        ({"block_q": 16.0}, "block_q must be an integer of at least 1, got 16.0"),
        ({"kv_len": "64"}, "kv_len must be an integer of at least 1, got '64'"),
        ({"compensate": 0.5}, "compensate must be 1 or 1 numbers in 0..1 .*got 0.5"),
        ({"compensate": (float("nan"),)}, "compensate must be"),
        ({"compensate": ("0.5",)}, "compensate must be"),
    ],
    ids=["list", "devices", "empty", "float", "string", "number", "nan", "text"],
)
def test_what_is_no_plan_is_refused(change, message):
    right = {"kv_counts": int32(1, 1, 2), "kv_indices": int32(1, 1, 2, 1)}
    right |= {"block_q": 16, "block_kv": 16, "q_len": 32, "kv_len": 64}
    BlockPlan(**right)
    assert BlockPlan(**right, compensate=[np.float32(0.5)]).compensate == (0.5,)
    with pytest.raises(PlanError, match=message):
        BlockPlan(**{**right, **change})


def test_values_are_looked_at_once(monkeypatch):
    """Not in a graph, nor of fake tensors, nor of what we made ourselves: on a GPU each look would wait for it."""
    seen = []
    monkeypatch.setattr(plan_module.values, "check_plan", lambda *args: seen.append(args))
    monkeypatch.setattr(plan_module.values, "check_classes", lambda *args: seen.append(args))
    found = make_candidates((2, 4, 8), 16, sparsity=0.5)
    Candidates.stack([found.to("cpu"), found]).to("meta")
    plan = make_plan("dynamicrad", (2, 4, 8), 16, sparsity=0.5).to("cpu")
    BlockPlan.stack([plan, plan_of(plan.block_mask(), 16, 16, 16, 16)])
    q = torch.zeros(1, 2, 64, 16)
    select_blocks(q, q, found, (0.0, 0.0))
    with FakeTensorMode() as mode:
        BlockPlan(mode.from_tensor(plan.kv_counts), mode.from_tensor(plan.kv_indices), 16, 16, 64, 64)

    def build(counts, indices):
        return BlockPlan(counts, indices, 16, 16, 64, 64).kv_counts + 1

    torch.compile(build, backend="eager", fullgraph=True)(plan.kv_counts, plan.kv_indices)
    assert not seen
    build(plan.kv_counts, plan.kv_indices)
    assert len(seen) == 1


def test_candidates_that_do_not_fit_are_refused():
    plan = BlockPlan(rows(2, 2), rows([0, 1], [0, 1]), 16, 16, 32, 64)
    Candidates(plan, rows(1, 0), rows(1, 2))
    for forced, near, message in (
        (rows(1, 2), rows(1, 1), r"row \[0, 0, 1\] .* kv_forced 2, kv_near 1 and kv_counts 2"),
        (rows(1, -1), rows(1, 1), "kv_forced -1"),
        (rows(1, 1), rows(1, 3), "kv_near 3 and kv_counts 2"),
        (rows(1, 1).long(), rows(1, 1), "expected kv_forced int32"),
        (rows(1, 1), rows(1, 1, 1), r"expected kv_near int32 \[1, 1, 2\]"),
        (rows(1, 1), None, "kv_near must be a tensor"),
    ):
        with pytest.raises(PlanError, match=message):
            Candidates(plan, forced, near)
    with pytest.raises(PlanError, match="expected a BlockPlan, got NoneType"):
        Candidates(None, rows(1, 1), rows(1, 1))


def test_plans_that_can_not_be_stacked_are_refused():
    plan = plan_of(random_mask(4, 4))
    for plans, message in (
        ([], "at least one plan"),
        ([plan, plan_of(random_mask(2, 4, 4))], "their number of heads"),
        ([plan, plan.to("meta")], "their device"),
        ([plan, plan_of(random_mask(5, 4))], "block_q, block_kv, q_len and kv_len"),
    ):
        with pytest.raises(PlanError, match=message):
            BlockPlan.stack(plans)


def test_attention_takes_plans_and_says_so():
    q = torch.zeros(1, 1, 64, 16)
    found = make_candidates((2, 4, 8), 16, sparsity=0.5)
    with pytest.raises(PlanError, match="expected a BlockPlan, as make_plan gives it, got Candidates"):
        block_sparse_attention(q, q, q, found)
    with pytest.raises(PlanError, match="k must be a tensor, got ndarray"):
        block_sparse_attention(q, q.numpy(), q, found.plan)
    with pytest.raises(PlanError, match="expected Candidates, as make_candidates gives them, got BlockPlan"):
        select_blocks(q, q, found.plan, (0.0, 0.0))
    with pytest.raises(PlanError, match="expected a flex BlockMask, got Tensor"):
        BlockPlan.from_block_mask(found.plan.block_mask())
    wrong = BlockMask.from_kv_blocks(rows(1, 1), rows([0, 1], [7, 0]), BLOCK_SIZE=16, compute_q_blocks=False)
    with pytest.raises(PlanError, match="query block 1 lists block 7"):
        BlockPlan.from_block_mask(wrong)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 3), "expected a bool mask"),
        (torch.zeros(3, dtype=torch.bool), "expected a bool mask"),
        (torch.zeros(2, 4, dtype=torch.bool), "does not give 4 kv blocks"),
        (torch.zeros(3, 3, dtype=torch.bool), "gives 2 query blocks"),
        (torch.zeros(0, 2, 3, dtype=torch.bool), "a head, a row and a block at least"),
        ([[True]], "mask must be a tensor, got list"),
    ],
    ids=["float", "rank", "columns", "rows", "empty", "list"],
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
        ({"grid": (500, 200, 200)}, "500 x 200 x 200: 20000000 tokens are 156250 blocks of 128, more than the 10000"),
        (
            {"pattern": "dense", "grid": (161, 90, 160)},
            r"18113 blocks of 128.*Take larger blocks",
        ),
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
