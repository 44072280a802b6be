"""Scores from int8: the CPU op, its gradient, the option of the backend, and what it costs in accuracy."""

from __future__ import annotations

import pytest
import torch
from support.attention_cases import CASES, build, case_of, check_int8
from support.graphs import compile_sparse, first_output, make, relative_error

import dynamicrad_compile as drad
from dynamicrad_compile.kernels import quantise

NAMES = [
    "ragged_both",
    "gqa_per_head",
    "mask_padding",
    "mask_all",
    "dim_24",
    "permuted",
    "scale",
    "fp16",
    "mean_ragged",
    "mean_bf16",
]


@pytest.mark.parametrize("name", NAMES)
def test_cpu(name: str):
    case = case_of(name)
    args = build(case)
    out, lse = torch.ops.dynamicrad.block_sparse_attention(*args, qk_int8=True)
    check_int8(out, lse, args, case.dtype)


def test_opcheck():
    args = build(next(case for case in CASES if case.name == "mean_ragged"))
    torch.library.opcheck(torch.ops.dynamicrad.block_sparse_attention.default, args, {"qk_int8": True})


def test_rows_are_rounded_by_half_a_step_at_most():
    x = torch.randn(2, 3, 50, 24) * torch.logspace(-3, 3, 50)[:, None]
    x[0, 0, 0] = 0
    rounded = quantise.quantise(x)
    assert rounded.values.abs().amax() == 127
    assert ((quantise.dequantise(rounded) - x).abs() <= 0.5001 * rounded.scales[..., None]).all()


def test_a_common_offset_of_the_keys_costs_nothing():
    torch.manual_seed(0)
    plan = drad.make_plan("dynamicrad", grid=(4, 6, 6), block_size=16, sparsity=0.5)
    q, k, v = torch.randn(3, 1, 2, 144, 32)
    far = k + 30 * torch.randn(1, 2, 1, 32)
    exact = drad.block_sparse_attention(q, k, v, plan, compensate=0.5)
    plain = relative_error(drad.block_sparse_attention(q, k, v, plan, compensate=0.5, qk_dtype="int8"), exact)
    offset = relative_error(drad.block_sparse_attention(q, far, v, plan, compensate=0.5, qk_dtype="int8"), exact)
    assert plain < 0.02
    assert offset < 1.5 * plain


def test_gradient_is_that_of_exact_scores():
    torch.manual_seed(0)
    plan = drad.make_plan("dynamicrad", grid=(4, 6, 6), block_size=16, sparsity=0.5)
    q, k, v = (torch.randn(1, 2, 144, 32, requires_grad=True) for _ in range(3))
    grads = [
        torch.autograd.grad(drad.block_sparse_attention(q, k, v, plan, qk_dtype=kind).square().sum(), (q, k, v))
        for kind in (None, "int8")
    ]
    for exact, rounded in zip(*grads, strict=True):
        assert relative_error(rounded, exact) < 0.05


def test_unknown_name():
    plan = drad.make_plan("dynamicrad", grid=(4, 6, 6), block_size=16, sparsity=0.5)
    q = torch.randn(1, 2, 144, 32)
    with pytest.raises(drad.PlanError, match="qk_dtype must be None or 'int8', got 'fp4'"):
        drad.block_sparse_attention(q, q, q, plan, qk_dtype="fp4")


def test_option():
    model, kwargs = make("wan_t2v")[:2]
    exact = first_output(compile_sparse(model, sparsity=0.5)(**kwargs))
    rounded = first_output(compile_sparse(model, sparsity=0.5, qk_dtype="int8")(**kwargs))
    assert 0 < relative_error(rounded, exact) < 0.02
