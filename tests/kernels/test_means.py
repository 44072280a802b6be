"""Compensation of dropped blocks: exact where it must be, and worth its cost on the published proxy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.attention_cases import CASES, build, check
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dynamicrad_compile as drad
from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels import groups_cpu as cpu
from dynamicrad_compile.kernels.attention_reference import kept_blocks, token_mask
from dynamicrad_compile.kernels.means import kept_bits
from dynamicrad_compile.plans.attention import block_sparse_attention
from dynamicrad_compile.plans.plan import BlockPlan

OP = torch.ops.dynamicrad.block_sparse_attention
COMPENSATED = [case for case in CASES if case.compensate is not None]
BY_NAME = {case.name: case for case in CASES}


def random_plan(length: int, block: int = 32, keep: float = 0.4) -> BlockPlan:
    m = -(-length // block)
    mask = torch.rand(m, m, generator=torch.Generator().manual_seed(0)) < keep
    return BlockPlan.from_mask(mask, block_q=block, block_kv=block, q_len=length, kv_len=length)


@pytest.mark.parametrize("case", COMPENSATED, ids=str)
def test_weight_zero_changes_nothing(case):
    args = list(build(case))
    args[9] = torch.zeros_like(args[9])
    for got, want in zip(OP(*args), OP(*args[:9]), strict=True):
        assert torch.equal(got, want)


def test_dense_rows_and_samples_of_weight_zero_are_plain():
    args = list(build(BY_NAME["mean_per_sample"]))
    plain, weighted = OP(*args[:9]), OP(*args)
    block = args[6]
    dense = args[3][0, 0] >= -(-args[1].shape[2] // args[7])
    assert dense.sum() == 1
    for got, want in zip(weighted, plain, strict=True):
        assert torch.equal(got[0], want[0])
        rows = slice(int(dense.nonzero()) * block, (int(dense.nonzero()) + 1) * block)
        assert torch.equal(got[1][:, rows], want[1][:, rows])
        assert not torch.equal(got[1], want[1])


@pytest.mark.parametrize("length", [128, 131], ids=["even", "ragged"])
def test_equal_tokens_within_a_block_give_dense_attention(length: int):
    """Then a mean stands for its block exactly, whatever the plan keeps, even nothing."""
    q, k, v = torch.randn(3, 2, 3, length, 16)
    k, v = (x[:, :, ::32].repeat_interleave(32, 2)[:, :, :length] for x in (k, v))
    for keep in (0.0, 0.4):
        got = block_sparse_attention(q, k, v, random_plan(length, keep=keep), compensate=1.0)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=3e-6)


def test_small_groups_give_the_same(monkeypatch: pytest.MonkeyPatch):
    args = build(BY_NAME["mean_per_batch_and_head"])
    expected = OP(*args)
    monkeypatch.setattr(cpu, "TASK_QUERIES", 1)
    monkeypatch.setattr(cpu, "CHUNK_TOKENS", 3)
    for got, want in zip(OP(*args), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_large_scores_do_not_overflow():
    q, k, v = torch.randn(3, 1, 2, 101, 16)
    plan, weight = random_plan(101), torch.tensor([0.5])
    out, lse = block_sparse_attention(100 * q, 100 * k, v, plan, compensate=weight, return_lse=True)
    args = (100 * q, 100 * k, v, plan.kv_counts, plan.kv_indices, None, 32, 32, None, weight)
    check(out, lse, args, torch.float32)


def test_number_and_tensor_are_the_same():
    q, k, v = torch.randn(3, 2, 2, 101, 16)
    plan = random_plan(101)
    number = block_sparse_attention(q, k, v, plan, compensate=0.25)
    assert torch.equal(number, block_sparse_attention(q, k, v, plan, compensate=torch.tensor([0.25])))
    assert torch.equal(number, block_sparse_attention(q, k, v, plan, compensate=torch.tensor([0.25, 0.25])))
    plain = block_sparse_attention(q, k, v, plan)
    assert torch.equal(plain, block_sparse_attention(q, k, v, plan, compensate=0))
    assert not torch.equal(plain, number)


@pytest.mark.parametrize("name", ["mean_ragged", "mean_per_batch_and_head", "mean_mask_random", "mean_bf16"])
def test_opcheck(name: str):
    args = build(BY_NAME[name])
    for op in (OP.default, torch.ops.dynamicrad.block_sparse_attention_cpu.default):
        torch.library.opcheck(op, args)


def test_changing_the_weight_does_not_recompile():
    q, k, v = torch.randn(3, 1, 2, 101, 16)
    plan = random_plan(101)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda weight: block_sparse_attention(q, k, v, plan, compensate=weight), backend=counter, fullgraph=True
    )
    for value in (0.0, 0.3, 1.0):
        weight = torch.tensor([value])
        torch.testing.assert_close(compiled(weight), block_sparse_attention(q, k, v, plan, compensate=weight))
    assert counter.frame_count == 1


@pytest.mark.parametrize("m_k", [1, 31, 32, 33, 64, 75])
def test_kept_bits(m_k: int):
    mask = torch.rand(2, 3, 5, m_k, generator=torch.Generator().manual_seed(m_k)) < 0.5
    mask[0, 0, 0], mask[0, 0, 1] = True, False
    plan = BlockPlan.from_mask(mask, block_q=16, block_kv=16, q_len=80, kv_len=16 * m_k)
    plan.kv_indices[0, 0, 0] = 0  # a dense row's indices are not read
    bits = kept_bits(plan.kv_counts, plan.kv_indices, m_k)
    assert bits.dtype == torch.int32
    assert bits.shape == (2, 3, 5, -(-m_k // 32))
    unpacked = (bits[..., None] >> torch.arange(32) & 1).flatten(-2)[..., :m_k].bool()
    assert torch.equal(unpacked, kept_blocks(plan.kv_counts, plan.kv_indices, m_k))


@pytest.mark.parametrize("name", ["mean_even", "mean_ragged", "mean_per_sample", "mean_per_batch_and_head"])
def test_flops_count_the_means(name: str):
    args = build(BY_NAME[name])
    q, k, counts, weight = args[0], args[1], args[3], args[9]
    batch, heads, q_len, dim = q.shape
    m_k = -(-k.shape[2] // args[7])
    pairs = token_mask(*args[3:5], *args[6:8], q_len, k.shape[2]).expand(batch, heads, -1, -1).sum()
    rows = (counts < m_k).repeat_interleave(args[6], -1)[..., :q_len] & (weight > 0)[:, None, None]
    pairs = pairs + m_k * rows.expand(batch, heads, -1).sum()
    with FlopCounterMode(display=False) as counter:
        OP(*args)
    assert counter.get_total_flops() == 4 * dim * int(pairs)


def test_flops_of_fake_tensors_count_the_means():
    args = build(BY_NAME["mean_even"])
    totals = []
    for given in (args, args[:9]):
        with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
            OP(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given))
        totals.append(counter.get_total_flops())
    assert totals[0] - totals[1] == 4 * 32 * 2 * 128 * 4


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (1.5, "compensate must be 0 to 1, got 1.5"),
        (float("nan"), "compensate must be 0 to 1, got nan"),
        (torch.ones(1).double(), r"expected compensate float32 \[B or 1\]"),
        (torch.ones(()), r"expected compensate float32 \[B or 1\]"),
        (torch.ones(3), "compensate's batch must be 1 or that of q"),
        (torch.ones(1, device="meta"), "compensate is on meta, q on cpu"),
    ],
    ids=["range", "nan", "dtype", "scalar", "batch", "device"],
)
def test_wrong_weights(weight, message):
    q, k, v = torch.randn(3, 2, 2, 64, 16)
    with pytest.raises(PlanError, match=message):
        block_sparse_attention(q, k, v, random_plan(64), compensate=weight)


# ---- the published proxy: 12 frames x 240 tokens, 2 heads, head_dim 64, block 32, q = k = v

FRAMES, TOKENS, BLOCK = 12, 240, 32


def proxy(motion: float) -> torch.Tensor:
    """[1, 2, FRAMES * TOKENS, 64]: each frame is the one before, moved towards noise by `motion`, and normalised."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(2, TOKENS, 64, generator=generator)

    x, frames = F.normalize(normal(), dim=-1) * 8, []
    for _ in range(FRAMES):
        frames.append(F.normalize(x, dim=-1) * 8)
        x = (1 - motion) * x + motion * normal()
    return torch.cat(frames, 1)[None]


def bands() -> BlockPlan:
    """The 18 % of block pairs that are nearest to the same place in their frames."""
    centre = torch.arange(BLOCK // 2, FRAMES * TOKENS, BLOCK).float()
    apart = (centre[:, None] - centre) % TOKENS
    distance = torch.minimum(apart, TOKENS - apart)
    mask = distance <= distance.flatten().kthvalue(int(0.18 * distance.numel())).values
    length = FRAMES * TOKENS
    return BlockPlan.from_mask(mask, block_q=BLOCK, block_kv=BLOCK, q_len=length, kv_len=length)


@pytest.mark.parametrize(("motion", "gain"), [(0.02, 2), (0.15, 10), (0.40, 10)], ids=["low", "mid", "high"])
def test_compensation_on_the_proxy(motion: float, gain: float):
    x, plan = proxy(motion), bands()
    dense = F.scaled_dot_product_attention(x, x, x)
    errors = []
    for weight in (None, 1.0):
        got = block_sparse_attention(x, x, x, plan, compensate=weight)
        errors.append(float((got - dense).square().mean() / dense.var()))
    print(f"motion {motion}: sparsity {plan.sparsity:.3f}, normalised MSE {errors[0]:.4f}, compensated {errors[1]:.4f}")
    assert errors[1] < errors[0] / gain


def test_the_plan_says_how_much_is_compensated():
    q, k, v = torch.randn(3, 1, 2, 8 * 64, 16)
    plan = drad.make_plan("dynamicrad", (8, 8, 8), 32, sparsity=0.7, compensate=0.5)
    given = drad.block_sparse_attention(q, k, v, plan, compensate=0.5)
    assert torch.equal(drad.block_sparse_attention(q, k, v, plan), given)
    assert not torch.equal(drad.block_sparse_attention(q, k, v, plan, compensate=0.0), given)
