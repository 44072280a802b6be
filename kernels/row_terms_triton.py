"""Triton kernel of what the backward kernels need of each row of the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows_triton import _load_rows


@triton.jit
def _row_terms(
    out,  # [B, H, Sq, D] contiguous
    grad_out,  # [B, H, Sq, D], last stride 1
    lse,  # fp32 [B, H, Sq] contiguous, as of the rest
    grad_lse,
    lse2,  # log2(e) * lse, +inf where lse is -inf
    delta,
    H,
    SQ,
    stride_gb,
    stride_gh,
    stride_gm,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    i_bh = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < SQ
    p_grad = grad_out + (i_bh // H) * stride_gb + (i_bh % H) * stride_gh
    b_out = _load_rows(out + i_bh * SQ * D, o_m, D, o_d, SQ, D, BLOCK_D, True, True)
    b_grad = _load_rows(p_grad, o_m, stride_gm, o_d, SQ, D, BLOCK_D, True, True)
    b_lse = tl.load(lse + i_bh * SQ + o_m, mask=m_m, other=0.0)
    b_grad_lse = tl.load(grad_lse + i_bh * SQ + o_m, mask=m_m, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)
    tl.store(lse2 + i_bh * SQ + o_m, b_lse, mask=m_m)
    tl.store(delta + i_bh * SQ + o_m, tl.sum(b_out * b_grad, 1) - b_grad_lse, mask=m_m)
