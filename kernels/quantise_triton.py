"""Triton kernel that rounds rows to int8, and its launcher: the CUDA side of `quantise.quantise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import wrap_triton
from .quantise import Quantised


@triton.jit
def _quantise_rows(
    x,  # [B, H, S, D], last stride 1
    mean,  # fp32 [B, H, D] contiguous; not read without HAS_MEAN
    values,  # int8 [B, H, S, D] contiguous
    scales,  # fp32 [B, H, S] contiguous
    H,
    S,
    stride_b,
    stride_h,
    stride_s,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    i_bh = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_sd = (o_s < S)[:, None] & m_d[None, :]
    p_x = x + (i_bh // H) * stride_b + (i_bh % H) * stride_h
    b_x = tl.load(p_x + o_s[:, None] * stride_s + o_d[None, :], mask=m_sd, other=0.0).to(tl.float32)
    if HAS_MEAN:
        b_x = b_x - tl.load(mean + i_bh * D + o_d, mask=m_d, other=0.0)[None, :]
        b_x = tl.where(m_sd, b_x, 0.0)
    b_scale = tl.maximum(tl.max(tl.abs(b_x), 1), 1e-20) / 127.0
    b_x = b_x / b_scale[:, None]
    b_x = tl.floor(b_x + 0.5)  # -127..127: the largest entry is one of the two
    tl.store(values + (i_bh * S + o_s)[:, None] * D + o_d[None, :], b_x.to(tl.int8), mask=m_sd)
    tl.store(scales + i_bh * S + o_s, b_scale, mask=o_s < S)


def quantise_rows(x: torch.Tensor, mean: torch.Tensor | None = None) -> Quantised:
    """Rows of x [B, H, S, D], less `mean` fp32 [B, H, D], in int8."""
    batch, heads, length, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    values = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty((batch, heads, length), dtype=torch.float32)
    wrap_triton(_quantise_rows)[(triton.cdiv(length, 32), batch * heads)](
        *(x, scales if mean is None else mean.contiguous(), values, scales, heads, length, *x.stride()[:3]),
        D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_S=32,
        HAS_MEAN=mean is not None,
    )
    return Quantised(values, scales)
