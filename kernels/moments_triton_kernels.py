"""Triton kernels of `second_order_attention`: moments of key blocks, their weighting, and what a query makes of them.

    _block_moments    C_J = E[dk dv'], var_J = E[dk^2]      one program a key block (and BLOCK_E columns of C)
    _weigh_moments    A_I = sum_J w_IJ C_J                  a product of [rep Mq, Mk] with [Mk, D D] for each key head
    _second_order     u, t, and the merge with what is kept, in one pass over q and the two results

A block is read twice, the second time from cache: deviations are taken from an exact mean, before they are rounded for
the tensor cores. Heads whose rows drop nothing are not `wanted`: their programs end at once, and what they would have
written stays uninitialised, to be read by nobody. Sums are fp32; C and A are bf16, or fp32 as the inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _block_moments(
    k,  # [B, Hkv, Sk, D], last stride 1, as of v
    v,  # [B, Hkv, Sk, D]
    n_valid,  # int32 [B'', Mk], valid keys of each block
    key_mask,  # bool [B'', Sk], last stride 1; not read without HAS_MASK
    wanted,  # int32 [B Hkv]
    both,  # [B, Hkv, Mk, D, D] contiguous; its dtype is that of the products
    variance,  # fp32 [B, Hkv, Mk, D] contiguous
    HKV,
    SK,
    MK,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_nb,
    stride_mb,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_j = tl.program_id(0).to(tl.int64)
    i_e = tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    if tl.load(wanted + i_bh) != 0:
        i_b, i_h = i_bh // HKV, i_bh % HKV
        o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
        o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
        m_d, m_e = o_d < D, o_e < D
        p_k = k + i_b * stride_kb + i_h * stride_kh
        p_v = v + i_b * stride_vb + i_h * stride_vh

        b_mean_k = tl.zeros([BLOCK_D], tl.float32)
        b_mean_v = tl.zeros([BLOCK_E], tl.float32)
        for start in range(0, BLOCK_KV, BLOCK_S):
            own = i_j * BLOCK_KV + start + o_s
            m_s = (start + o_s < BLOCK_KV) & (own < SK)
            if HAS_MASK:
                m_s = m_s & (tl.load(key_mask + i_b * stride_mb + own, mask=m_s, other=0) != 0)
            p_own_k = p_k + own[:, None] * stride_ks + o_d[None, :]
            p_own_v = p_v + own[:, None] * stride_vs + o_e[None, :]
            b_k = tl.load(p_own_k, mask=m_s[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_v = tl.load(p_own_v, mask=m_s[:, None] & m_e[None, :], other=0.0).to(tl.float32)
            b_mean_k += tl.sum(b_k, 0)
            b_mean_v += tl.sum(b_v, 0)
        per_key = 1.0 / tl.maximum(tl.load(n_valid + i_b * stride_nb + i_j), 1).to(tl.float32)
        b_mean_k *= per_key
        b_mean_v *= per_key

        b_both = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
        b_variance = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, BLOCK_KV, BLOCK_S):
            own = i_j * BLOCK_KV + start + o_s
            m_s = (start + o_s < BLOCK_KV) & (own < SK)
            if HAS_MASK:
                m_s = m_s & (tl.load(key_mask + i_b * stride_mb + own, mask=m_s, other=0) != 0)
            p_own_k = p_k + own[:, None] * stride_ks + o_d[None, :]
            p_own_v = p_v + own[:, None] * stride_vs + o_e[None, :]
            b_k = tl.load(p_own_k, mask=m_s[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_v = tl.load(p_own_v, mask=m_s[:, None] & m_e[None, :], other=0.0).to(tl.float32)
            b_k = tl.where(m_s[:, None], b_k - b_mean_k[None, :], 0.0)
            b_v = tl.where(m_s[:, None], b_v - b_mean_v[None, :], 0.0)
            b_variance += tl.sum(b_k * b_k, 0)
            b_k, b_v = b_k.to(both.dtype.element_ty), b_v.to(both.dtype.element_ty)
            b_both = tl.dot(tl.trans(b_k), b_v, b_both, input_precision=PRECISION)
        place = i_bh * MK + i_j
        p_both = both + (place * D + o_d[:, None]) * D + o_e[None, :]
        tl.store(p_both, (b_both * per_key).to(both.dtype.element_ty), mask=m_d[:, None] & m_e[None, :])
        tl.store(variance + place * D + o_d, b_variance * per_key, mask=o_d < tl.where(i_e == 0, D, 0))


@triton.jit
def _weigh_moments(
    weights,  # fp32 [B Hkv, R, Mk] contiguous
    both,  # [B Hkv, Mk, N] contiguous
    wanted,  # int32 [B Hkv]
    products,  # [B Hkv, R, N] contiguous, dtype of both
    R,
    MK,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_g = tl.program_id(2).to(tl.int64)
    if tl.load(wanted + i_g) != 0:
        o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_k = tl.arange(0, BLOCK_K)
        m_m, m_n = o_m < R, o_n < N
        p_w = weights + i_g * R * MK + o_m.to(tl.int64)[:, None] * MK
        p_c = both + i_g * MK * N + o_n[None, :]
        b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, MK, BLOCK_K):
            own = start + o_k
            m_k = own < MK
            b_w = tl.load(p_w + own[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0).to(both.dtype.element_ty)
            p_own = p_c + own.to(tl.int64)[:, None] * N
            b_c = tl.load(p_own, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_acc = tl.dot(b_w, b_c, b_acc, input_precision=PRECISION)
        p_out = products + i_g * R * N + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        tl.store(p_out, b_acc.to(products.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _second_order(
    q,  # [B, H, Sq, D], last stride 1
    products,  # [B, H, Mq, D, D] contiguous, A
    squares,  # fp32 [B, H, Mq, D] contiguous, R
    kept,  # [B, H, Sq, D] contiguous, as dropped and out
    kept_lse,  # fp32 [B, H, Sq] contiguous, as dropped_lse and lse
    dropped,
    dropped_lse,
    out,
    lse,
    scale,
    H,
    SQ,
    MQ,
    stride_qb,
    stride_qh,
    stride_qm,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_m = tl.program_id(0)
    i_e = tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    m_m, m_e = o_m < SQ, o_e < D
    o_lse = i_bh * SQ + o_m
    o_out = o_lse[:, None] * D + o_e[None, :]
    m_out = m_m[:, None] & m_e[None, :]
    b_kept_lse = tl.load(kept_lse + o_lse, mask=m_m, other=float("-inf"))
    b_lse = tl.load(dropped_lse + o_lse, mask=m_m, other=float("-inf"))
    if tl.max(b_lse, 0) > float("-inf"):
        p_q = q + (i_bh // H) * stride_qb + (i_bh % H) * stride_qh + o_m.to(tl.int64)[:, None] * stride_qm
        i_row = i_bh * MQ + i_m // (BLOCK_Q // BLOCK_M)
        b_t = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        b_growth = tl.full([BLOCK_M], 1.0, tl.float32)
        factor = tl.cast(scale, tl.float32)
        for start in range(0, BLOCK_D, BLOCK_K):
            own = start + o_k
            m_k = own < D
            b_q = tl.load(p_q + own[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            p_a = products + (i_row * D + own[:, None]) * D + o_e[None, :]
            b_a = tl.load(p_a, mask=m_k[:, None] & m_e[None, :], other=0.0)
            b_r = tl.load(squares + i_row * D + own, mask=m_k, other=0.0)
            b_t = tl.dot(b_q.to(b_a.dtype), b_a, b_t, input_precision=PRECISION)
            b_q = b_q.to(tl.float32) * factor
            b_growth += 0.5 * tl.sum(b_q * b_q * b_r[None, :], 1)
        b_dropped = tl.load(dropped + o_out, mask=m_out, other=0.0).to(tl.float32)
        b_dropped += b_t * (factor / b_growth)[:, None]
        b_lse += tl.log(b_growth)
        b_top = tl.maximum(b_lse, b_kept_lse)
        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_kept_weight = tl.exp(b_kept_lse - b_top)
        b_weight = tl.exp(b_lse - b_top)
        b_sum = b_kept_weight + b_weight
        b_kept = tl.load(kept + o_out, mask=m_out, other=0.0).to(tl.float32)
        b_whole = b_kept * b_kept_weight[:, None] + b_dropped * b_weight[:, None]
        b_whole = b_whole / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        tl.store(out + o_out, b_whole.to(out.dtype.element_ty), mask=m_out)
        b_kept_lse = b_top + tl.log(b_sum)
    else:
        tl.store(out + o_out, tl.load(kept + o_out, mask=m_out, other=0.0), mask=m_out)
    tl.store(lse + o_lse, b_kept_lse, mask=o_m < tl.where(i_e == 0, SQ, 0))
