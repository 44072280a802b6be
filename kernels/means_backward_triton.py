"""Triton kernel of the gradient of the mean keys and values, and its launcher.

The products are those of `attention_backward_triton_kernels`, with the means as keys. Means are few, so a program
walks all rows of the plan, in some splits that are summed afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import mean_operands, sizes_of, tile_sizes, wrap_triton
from .attention_arguments import Attention, Means
from .rows_triton import _load_rows, _mean_bias
from .tiles import Tile

MAX_SPLITS = 8  # of the queries; each holds fp32 gradients of all means
SPLIT_TILES = 64  # query tiles of a split, at least


@triton.jit
def _dmeans(
    q,  # [B, H, Sq, D], last stride 1, as of grad_out
    grad_out,  # [B, H, Sq, D]
    lse2,  # fp32 [B, H, Sq] contiguous, of `_row_terms`, as delta
    delta,
    mean_k,  # [B, Hkv, Mk, D] contiguous, as mean_v
    mean_v,
    n_valid,  # int32 [B'', Mk]
    weight,  # fp32 [B or 1]
    kept,  # int32 [B', H', Mq, ceil(Mk / 32)], a bit per block
    dmean_k,  # fp32 [splits, B, Hkv, Mk, D] contiguous, as dmean_v
    dmean_v,
    scale,
    H,
    KV_GROUP,  # H / Hkv
    SQ,
    MK,
    TILES,  # query tiles of a split
    stride_qb,
    stride_qh,
    stride_qm,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_nb,
    stride_wb,
    stride_eb,
    stride_eh,
    stride_em,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_bh = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2)
    n_kv = H // KV_GROUP
    i_b, i_hkv = i_bh // n_kv, i_bh % n_kv
    o_j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    b_k = _load_rows(mean_k + i_bh * MK * D, o_j, D, o_d, MK, D, BLOCK_D, True, WIDEN)
    b_v = _load_rows(mean_v + i_bh * MK * D, o_j, D, o_d, MK, D, BLOCK_D, True, WIDEN)
    b_weight = tl.load(weight + i_b * stride_wb)
    scale2 = tl.cast(scale, tl.float32) * 1.4426950408889634
    first_tile = i_split * TILES
    last_tile = tl.minimum(first_tile + TILES, tl.cdiv(SQ, BLOCK_M))
    last_tile = tl.where(b_weight > 0.0, last_tile, first_tile)

    b_dk = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    b_dv = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for i_g in range(KV_GROUP):
        i_h = i_hkv * KV_GROUP + i_g
        p_q = q + i_b * stride_qb + i_h * stride_qh
        p_do = grad_out + i_b * stride_gb + i_h * stride_gh
        p_kept = kept + i_b * stride_eb + i_h * stride_eh
        first = (i_b * H + i_h) * SQ
        for i_m in range(first_tile, last_tile):
            o_query = i_m * BLOCK_M + o_m
            m_m = o_query < SQ
            b_q = _load_rows(p_q, o_query, stride_qm, o_d, SQ, D, BLOCK_D, True, WIDEN)
            b_do = _load_rows(p_do, o_query, stride_gm, o_d, SQ, D, BLOCK_D, True, WIDEN)
            b_lse = tl.load(lse2 + first + o_query, mask=m_m, other=float("inf"))
            b_delta = tl.load(delta + first + o_query, mask=m_m, other=0.0)
            i_row = tl.cast(i_m // (BLOCK_Q // BLOCK_M), tl.int64)
            b_bias = _mean_bias(n_valid + i_b * stride_nb, b_weight, p_kept + i_row * stride_em, o_j, MK)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            b_p = tl.exp2(tl.fma(b_s, scale2, b_bias[:, None] - b_lse[None, :]))
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    n_heads = tl.num_programs(1)
    o_out = ((i_split * n_heads + i_bh) * MK + o_j)[:, None] * D + o_d[None, :]
    m_out = (o_j < MK)[:, None] & (o_d < D)[None, :]
    tl.store(dmean_k + o_out, b_dk * tl.cast(scale, tl.float32), mask=m_out)
    tl.store(dmean_v + o_out, b_dv, mask=m_out)


def launch_dmeans(
    a: Attention, means: Means, queries: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [B, Hkv, Mk, D]: gradients of the mean keys and of the mean values, divided by the keys behind each.

    queries: q and grad_out [B, H, Sq, D], last stride 1, lse2 and delta fp32 [B, H, Sq] of `_row_terms`.
    """
    q, grad_out, lse2, delta = queries
    (batch, heads, q_len, dim), kv_heads = q.shape, a.k.shape[1]
    n_means, n_tiles = means.keys.shape[2], triton.cdiv(q_len, tile.block_m)
    splits = max(1, min(MAX_SPLITS, n_tiles // SPLIT_TILES))
    dmean_k, dmean_v = (q.new_empty((splits, batch, kv_heads, n_means, dim), dtype=torch.float32) for _ in range(2))
    tensors, strides = mean_operands(means, q)
    wrap_triton(_dmeans)[(triton.cdiv(n_means, tile.block_n), batch * kv_heads, splits)](
        *(q, grad_out, lse2, delta, *tensors, dmean_k, dmean_v),
        *(a.factor, heads, heads // kv_heads, q_len, n_means, triton.cdiv(n_tiles, splits)),
        *(*q.stride()[:3], *grad_out.stride()[:3], *strides),
        **sizes_of(q),
        BLOCK_Q=a.block_q,
        **tile_sizes(tile),
    )
    per_key = means.counts.clamp(min=1).unsqueeze(1).unsqueeze(-1).reciprocal()
    return dmean_k.sum(0) * per_key, dmean_v.sum(0) * per_key
