"""Cases of the backward of block-sparse attention, for the CPU and Triton tests; plans and layouts as forward.

`interpret` computes a case with the Triton kernels, in a process that imported Triton with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dynamicrad_compile.kernels.attention_arguments import Attention
from dynamicrad_compile.kernels.tiles import BackwardTiles
from support.attention_cases import BF16, CASES, HALF, Case, build, case_of, reference

# The interpreter is slow: one case of each kind.
_INTERPRETED = """
    ragged_both one_block cross_lengths blocks_differ blocks_differ_other_way block_not_power_of_two gqa_per_head
    per_batch_and_head permuted dim_24 dim_256 mask_random mask_all fp16 bf16
    mean_ragged mean_one_block mean_per_sample mean_many_blocks mean_gqa mean_sliced mean_mask_random mean_mask_all
    mean_fp16 mean_bf16 mean_keeps_nothing wrong_per_head mean_wrong
"""
# How the kernels may be launched, and the cases that are run so; the copy engine can't read the unaligned one.
_TMA = """
    ragged_both cross_lengths gqa_per_head dim_24 permuted sliced mask_random fp16 bf16 fp16_unaligned mean_ragged
    mean_sliced wrong_per_head
"""
VARIANTS = {"tma": _TMA.split()}
INTERPRETED_CASES = [case for case in CASES if case.name in set(_INTERPRETED.split())]


def build_backward(case: Case) -> tuple:
    """Positional arguments of the backward op; out and lse are those of the fp64 reference, rounded."""
    q, k, v, *plan = args = build(case)
    generator = torch.Generator().manual_seed(len(case.name))
    out, lse = reference(args)
    grad_out = torch.randn(q.shape, generator=generator).to(q.dtype)
    if case.layout != "contiguous":
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    grad_lse = torch.randn(lse.shape, generator=generator)
    return (q, k, v, out.to(q.dtype), lse.float(), grad_out, grad_lse, *plan)


def expected_gradients(args: tuple) -> tuple[torch.Tensor, ...]:
    from dynamicrad_compile.kernels.attention_backward_reference import block_sparse_attention_backward_reference

    q, k, v, _, _, grad_out, grad_lse, *plan = args
    return block_sparse_attention_backward_reference(q, k, v, grad_out, grad_lse, *plan)


def check_gradients(got: tuple[torch.Tensor, ...], args: tuple) -> None:
    """Compare with the fp64 reference: the largest error against the largest value of a gradient.

    fp32: 1e-5. fp16 and bf16 round out, and so delta, to 11 and 8 bits, the result, and on CUDA P and dS.
    """
    tolerance = {torch.float32: 1e-5, HALF: 2e-3, BF16: 1.6e-2}[args[0].dtype]
    for name, grad, want, x in zip(("dq", "dk", "dv"), got, expected_gradients(args), args, strict=False):
        assert grad.shape == x.shape
        assert not grad.isnan().any(), name
        error = (grad.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.2e}"
    if (mask := args[12]) is not None:
        hidden = ~mask.expand(args[0].shape[0], -1)
        for grad in got[1:]:
            assert (grad.transpose(1, 2)[hidden] == 0).all()


def tiles_of(a: Attention, variant: str) -> BackwardTiles:
    """The plain kernels' tiles, with several tiles a block where they are large enough, for a variant of VARIANTS."""
    from dynamicrad_compile.kernels.attention_backward_triton import backward_tiles

    tiles = backward_tiles(a, variants=False)
    return tiles._replace(
        dq=replace(tiles.dq, block_n=16, kernel=variant), dk_dv=replace(tiles.dk_dv, block_m=16, kernel=variant)
    )


def interpret(name: str, variant: str = "") -> tuple[torch.Tensor, ...]:
    """dq, dk and dv of a case, in fp32, launched as by default or as one of VARIANTS says."""
    from dynamicrad_compile.kernels._launch import INTERPRETED
    from dynamicrad_compile.kernels.attention_backward_op import split
    from dynamicrad_compile.kernels.attention_backward_triton import launch_backward
    from dynamicrad_compile.kernels.means import means_of

    assert INTERPRETED, "set TRITON_INTERPRET=1"
    case = case_of(name)
    a, forward = split(build_backward(case))
    means = None if a.compensate is None else means_of(a)
    grads = launch_backward(a, forward, means, tiles_of(a, variant) if variant else None)
    assert all(grad.is_contiguous() and grad.dtype == case.dtype for grad in grads)
    return tuple(grad.float() for grad in grads)
