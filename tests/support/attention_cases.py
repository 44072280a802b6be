"""Cases of block-sparse attention shared by the CPU and Triton tests: odd lengths, layouts, masks, plans.

`interpret` computes a case with the Triton kernel, in a process that imported Triton with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dynamicrad_compile.kernels.blocks import cdiv
from dynamicrad_compile.plans.plan import BlockPlan


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 128
    kv_len: int = 128
    dim: int = 32
    block_q: int = 32
    block_kv: int = 32
    plan_batch: int = 1
    plan_heads: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # "bshd": permuted from [B, S, H, D]; "slice": part of a wider tensor
    mask: str = "none"  # "random": any key may be hidden; "padding": right padding; "all": one sample sees nothing
    scale: float | None = None
    keep: float = 0.4
    compensate: tuple[float, ...] | None = None  # one weight per sample, or one for all
    wrong: bool = False  # some counts and ids are out of range

    def __str__(self) -> str:
        return self.name


HALF, BF16 = torch.float16, torch.bfloat16
CASES = [
    Case("even"),
    Case("ragged_both", q_len=101, kv_len=115),
    Case("one_block", q_len=7, kv_len=13),
    Case("cross_lengths", q_len=61, kv_len=203, batch=2),
    Case("blocks_differ", q_len=150, kv_len=150, block_q=64, block_kv=16),
    Case("blocks_differ_other_way", q_len=150, kv_len=150, block_q=16, block_kv=64),
    Case("block_not_power_of_two", q_len=150, kv_len=150, block_q=48, block_kv=48),
    Case("sub_tiles", q_len=300, kv_len=300, block_q=256, block_kv=128, heads=1, kv_heads=1),
    Case("gqa", heads=4, kv_heads=2, q_len=101, kv_len=101),
    Case("gqa_per_head", heads=6, kv_heads=2, plan_heads=6, q_len=101, kv_len=101),
    Case("multi_query", heads=3, kv_heads=1, batch=2, q_len=67, kv_len=67),
    Case("per_head", heads=3, kv_heads=3, plan_heads=3, q_len=101, kv_len=101),
    Case("per_batch", batch=3, plan_batch=3, q_len=101, kv_len=101),
    Case("per_batch_and_head", batch=2, plan_batch=2, plan_heads=2, q_len=101, kv_len=101),
    Case("permuted", layout="bshd", batch=2, q_len=101, kv_len=101),
    Case("sliced", layout="slice", batch=2, q_len=96, kv_len=96),
    Case("dim_24", dim=24, q_len=101, kv_len=101),
    Case("dim_40", dim=40, layout="bshd", q_len=101, kv_len=101),
    Case("dim_64", dim=64, q_len=101, kv_len=101),
    Case("dim_80", dim=80, q_len=101, kv_len=101, heads=1, kv_heads=1),
    Case("dim_128", dim=128, q_len=101, kv_len=101, heads=1, kv_heads=1),
    Case("dim_256", dim=256, q_len=67, kv_len=67, heads=1, kv_heads=1),
    Case("mask_random", mask="random", batch=2, q_len=101, kv_len=101),
    Case("mask_random_even", mask="random", batch=2),
    Case("mask_padding", mask="padding", batch=2, q_len=101, kv_len=115),
    Case("mask_all", mask="all", batch=2, q_len=67, kv_len=67),
    Case("scale", scale=0.5, q_len=101, kv_len=101),
    Case("fp16", dtype=HALF, q_len=101, kv_len=101),
    Case("bf16", dtype=BF16, q_len=101, kv_len=101, mask="padding"),
    Case("fp16_unaligned", dtype=HALF, layout="slice", q_len=101, kv_len=101, dim=28),
    Case("fp16_blocks_of_16", dtype=HALF, q_len=101, kv_len=101, block_q=16, block_kv=16, dim=24),
    Case("mean_even", compensate=(1.0,)),
    Case("mean_ragged", compensate=(0.7,), batch=2, q_len=101, kv_len=115),
    Case("mean_one_block", compensate=(1.0,), q_len=7, kv_len=13),
    Case("mean_per_sample", compensate=(0.0, 1.0, 0.3), batch=3, plan_batch=3, q_len=101, kv_len=101),
    Case("mean_per_batch_and_head", compensate=(0.5, 1.0), batch=2, plan_batch=2, plan_heads=2, q_len=101, kv_len=101),
    Case("mean_many_blocks", compensate=(1.0,), q_len=70, kv_len=1223, block_q=32, block_kv=16, keep=0.2),
    Case("mean_gqa", compensate=(1.0,), heads=6, kv_heads=2, plan_heads=6, q_len=101, kv_len=101),
    Case("mean_sliced", compensate=(1.0,), layout="slice", batch=2, q_len=96, kv_len=96, dim=24),
    Case("mean_permuted", compensate=(1.0,), layout="bshd", batch=2, q_len=101, kv_len=101, dim=40),
    Case("mean_dim_128", compensate=(1.0,), dim=128, q_len=101, kv_len=101, heads=1, kv_heads=1),
    Case("mean_dim_256", compensate=(1.0,), dim=256, q_len=67, kv_len=67, heads=1, kv_heads=1),
    Case("mean_mask_random", compensate=(1.0, 0.2), mask="random", batch=2, q_len=101, kv_len=115),
    Case("mean_mask_padding", compensate=(1.0,), mask="padding", batch=2, q_len=101, kv_len=203),
    Case("mean_mask_all", compensate=(1.0,), mask="all", batch=2, q_len=67, kv_len=67),
    Case("mean_scale", compensate=(1.0,), scale=0.5, q_len=101, kv_len=101),
    Case("mean_fp16", compensate=(1.0,), dtype=HALF, q_len=101, kv_len=101),
    Case("mean_bf16", compensate=(1.0,), dtype=BF16, q_len=101, kv_len=101, mask="padding"),
    Case("mean_keeps_nothing", compensate=(1.0,), keep=0.0, q_len=101, kv_len=115),
    Case("wrong", wrong=True, q_len=150, kv_len=333),
    Case("wrong_per_head", wrong=True, heads=4, plan_heads=4, q_len=150, kv_len=352, mask="random"),
    Case("mean_wrong", wrong=True, compensate=(1.0,), batch=2, q_len=150, kv_len=333),
]


def case_of(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


# How the kernel may be launched, and the cases that are run so.
VARIANTS = {
    "splits": [
        "ragged_both",
        "gqa_per_head",
        "mean_ragged",
        "mask_padding",
        "cross_lengths",
        "fp16",
        "mean_keeps_nothing",
        "wrong",
    ],
    "int8": ["ragged_both", "gqa_per_head", "mean_ragged", "mask_padding", "dim_24", "permuted", "fp16", "mean_bf16"],
    "dropped": ["mean_ragged", "mean_per_sample", "mean_many_blocks", "mean_mask_random", "mean_bf16", "mean_wrong"],
    "tma": [
        "ragged_both",
        "gqa_per_head",
        "mean_ragged",
        "mask_padding",
        "dim_24",
        "permuted",
        "sliced",
        "fp16",
        "fp16_unaligned",
        "wrong",
    ],
}


def build_plan(case: Case, generator: torch.Generator) -> BlockPlan:
    """Random plan with, where there is room, an empty row, a dense row with wrong ids, and a descending row."""
    m_q, m_k = cdiv(case.q_len, case.block_q), cdiv(case.kv_len, case.block_kv)
    mask = torch.rand(case.plan_batch, case.plan_heads, m_q, m_k, generator=generator) < case.keep
    mask[..., -1, -1] = True
    if m_q > 2:
        mask[..., 0, :] = False
    if m_k > 1:
        mask[..., 0] &= ~mask.all(-1)  # so that W < Mk and the dense row below is wider than the table
    plan = BlockPlan.from_mask(mask, block_q=case.block_q, block_kv=case.block_kv, q_len=case.q_len, kv_len=case.kv_len)
    if m_q > 3:
        plan.kv_counts[..., 1] = m_k
        plan.kv_indices[..., 1, :] = 0
    if m_q > 2:
        n = int(plan.kv_counts[0, 0, 2])
        plan.kv_indices[0, 0, 2, :n] = plan.kv_indices[0, 0, 2, :n].flip(0)
    if case.wrong:
        make_wrong(plan.kv_counts, plan.kv_indices, m_k)
    return plan


def make_wrong(counts: torch.Tensor, indices: torch.Tensor, m_k: int) -> None:
    """Put values out of range into rows 0 to 3; clamped, the ids of a row still differ. W must be below Mk - 1."""
    width = indices.shape[-1]
    assert 3 <= width < m_k - 1
    counts[..., 0], counts[..., 1], counts[..., 2] = -3, m_k + 7, width + 1
    indices[..., 2, :] = torch.arange(width, dtype=torch.int32) + 1
    indices[..., 2, 0], indices[..., 2, 1] = m_k + (1 << 20), -(1 << 30)
    counts[..., 3], indices[..., 3, 0], indices[..., 3, 1] = 2, -1, m_k


def build(case: Case) -> tuple:
    """Positional arguments of the op."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def tensor(heads: int, length: int) -> torch.Tensor:
        if case.layout == "bshd":
            x = torch.randn(case.batch, length, heads, case.dim, generator=generator).transpose(1, 2)
        elif case.layout == "slice":
            x = torch.randn(case.batch, heads, length + 3, case.dim + 8, generator=generator)[:, :, 2:-1, 8:]
        else:
            x = torch.randn(case.batch, heads, length, case.dim, generator=generator)
        return x.to(case.dtype)

    q, k, v = tensor(case.heads, case.q_len), tensor(case.kv_heads, case.kv_len), tensor(case.kv_heads, case.kv_len)
    plan = build_plan(case, generator)
    kv_mask = None
    if case.mask == "random":
        kv_mask = torch.rand(case.batch, case.kv_len, generator=generator) < 0.4
    elif case.mask == "padding":
        lengths = torch.randint(case.kv_len // 2, case.kv_len, (case.batch, 1), generator=generator)
        kv_mask = torch.arange(case.kv_len) < lengths
    elif case.mask == "all":
        kv_mask = torch.ones(case.batch, case.kv_len, dtype=torch.bool)
        kv_mask[0] = False
    return (
        *(q, k, v, plan.kv_counts, plan.kv_indices),
        *(case.scale, plan.block_q, plan.block_kv, kv_mask),
        None if case.compensate is None else torch.tensor(case.compensate),
    )


def reference(args: tuple, means_alone: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 result of the op's arguments, or of the same ones for `means_attention`."""
    from dynamicrad_compile.kernels.attention_reference import (
        block_sparse_attention_reference,
        means_attention_reference,
    )

    return (means_attention_reference if means_alone else block_sparse_attention_reference)(*args)


def check(out: torch.Tensor, lse: torch.Tensor, args: tuple, dtype: torch.dtype, means_alone: bool = False) -> None:
    """Compare with the fp64 reference.

    fp32: 1e-5 relative. fp16 and bf16 round the output, and on CUDA the probabilities, to 11 and 8 bits, so
    values of the order of 1 carry errors of some 2^-11 and 2^-8. Scores stay fp32, so lse is as exact as in fp32.
    """
    expected, expected_lse = reference(args, means_alone)
    assert not out.isnan().any()
    rtol, atol = {torch.float32: (1e-5, 3e-6), HALF: (2e-3, 1e-3), BF16: (1.6e-2, 8e-3)}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def check_result(result: tuple[torch.Tensor, torch.Tensor], args: tuple, case: Case, means_alone: bool = False) -> None:
    """Layout and dtypes of an op's (out, lse), and `check`."""
    out, lse = result
    assert out.is_contiguous()
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    check(out, lse, args, case.dtype, means_alone)


def check_int8(out: torch.Tensor, lse: torch.Tensor, args: tuple, dtype: torch.dtype) -> None:
    """Near the fp64 reference; in fp32, without mean keys, equal to it for queries and keys rounded to int8."""
    from dynamicrad_compile.kernels import quantise

    expected, expected_lse = reference(args)
    assert not out.isnan().any()
    seen = ~expected_lse.isinf()
    assert (out - expected).norm() <= 0.02 * expected.norm()  # 1 part in 254 of a row's largest entry, summed over dim
    torch.testing.assert_close(lse.double()[seen], expected_lse[seen], rtol=0, atol=0.05)
    assert torch.equal(lse.isinf(), ~seen)
    if args[9] is None and dtype == torch.float32:
        q, k, *rest = args
        mean = quantise.mean_key(k)
        q8, k8 = (quantise.dequantise(x) for x in (quantise.quantise(q), quantise.quantise(k, mean)))
        expected, expected_lse = reference((q8, k8, *rest))
        expected_lse += quantise.shift(q, mean, q.shape[-1] ** -0.5 if args[5] is None else args[5])
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=3e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def interpret(name: str, variant: str = "") -> tuple[torch.Tensor, ...]:
    """out, in fp32, and lse of a case, launched as by default or as one of VARIANTS says."""
    from dynamicrad_compile.kernels._launch import INTERPRETED
    from dynamicrad_compile.kernels.attention_arguments import Attention, Means
    from dynamicrad_compile.kernels.attention_triton import launch_forward
    from dynamicrad_compile.kernels.blocks import valid_counts
    from dynamicrad_compile.kernels.means import kept_bits
    from dynamicrad_compile.kernels.pool_triton import launch_pooling
    from dynamicrad_compile.kernels.tiles import choose_tile

    assert INTERPRETED, "set TRITON_INTERPRET=1"
    case = case_of(name)
    a, means = Attention(*build(case)), None
    if a.compensate is not None:
        valid = valid_counts(case.kv_len, case.block_kv, a.kv_mask, a.k.device)
        mean_k, mean_v = (launch_pooling(x, valid, case.block_kv, a.kv_mask) for x in (a.k, a.v))
        means = Means(mean_k, mean_v, valid, a.compensate, kept_bits(a.kv_counts, a.kv_indices, mean_k.shape[2]))
    if not variant:
        out, lse = launch_forward(a, means)
    else:
        tile = choose_tile((9, 0), case.dtype != torch.float32, case.dim, case.block_q, case.block_kv)
        read = torch.zeros_like(a.kv_counts) if variant == "dropped" else a.kv_counts
        out, lse = launch_forward(
            a._replace(kv_counts=read, qk_int8=variant == "int8"),
            means,
            tile=replace(tile, kernel="tma" if variant == "tma" else "triton", block_n=16),
            splits=3 if variant == "splits" else 1,
        )
    assert out.is_contiguous()
    assert out.dtype == case.dtype
    return out.float(), lse
