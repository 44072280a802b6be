"""Triton backward kernels of block-sparse attention.

With P = exp(scale * q k^T - lse) and delta = rowsum(do * out) - dlse (Dao 2023, FlashAttention-2, algorithm 2):

    dv = P^T do,  dS = P * (do v^T - delta),  dq = scale dS k,  dk = scale dS^T q

`row_terms_triton` computes delta, and lse in powers of two with +inf where a query has no key, so that its P is 0.
`_dq` walks the key tiles of a row of the plan, `_dk_dv` the query tiles of a row of the transposed plan, head by
head of the group that shares the keys. Each result is written once by one program: no atomics, always the same bits.
Hidden keys need a select in `_dq`; in `_dk_dv` they are rows of their own, zeroed at the end.

With TMA the rows of the loop are read through host tensor descriptors by the copy engine of sm_90.

With compensation `_dq` also walks the mean keys of the blocks that a row drops, and `_dk_dv` adds the gradient of the
means, of `means_backward_triton`, to the keys of each block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows_triton import _load_rows, _mean_bias


@triton.jit
def _described_rows(x, i_b, i_h, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr):
    """[ROWS, BLOCK_D] from row `first` on of a head of x, a descriptor of [B, H, S, D]; zeros beyond S and D."""
    b_x = x.load([i_b, i_h, first, 0]).reshape(ROWS, BLOCK_D)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def _dq(
    q,  # [B, H, Sq, D], last stride 1, as of k, v, grad_out
    k,  # [B, Hkv, Sk, D]; with TMA a descriptor of it with blocks [1, 1, BLOCK_N, BLOCK_D], as v
    v,  # [B, Hkv, Sk, D]
    grad_out,  # [B, H, Sq, D]
    lse2,  # fp32 [B, H, Sq] contiguous, of `_row_terms`, as delta
    delta,
    counts,  # int32 [B', H', Mq]
    indices,  # int32 [B', H', Mq, W], last stride 1
    key_mask,  # bool [B'', Sk], last stride 1; not read without HAS_MASK
    mean_k,  # [B, Hkv, Mk, D] contiguous; this and the next four are not read without COMPENSATE
    mean_v,  # [B, Hkv, Mk, D] contiguous
    n_valid,  # int32 [B'', Mk]
    weight,  # fp32 [B or 1]
    kept,  # int32 [B', H', Mq, ceil(Mk / 32)], a bit per block
    dq,  # [B, H, Sq, D] contiguous
    scale,
    H,
    KV_GROUP,  # H / Hkv
    SQ,
    SK,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_cb,
    stride_ch,
    stride_cm,
    stride_ib,
    stride_ih,
    stride_im,
    stride_mb,
    stride_nb,
    stride_wb,
    stride_eb,
    stride_eh,
    stride_em,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,  # means of blocks at a time
    RAGGED: tl.constexpr,  # SK is not a multiple of BLOCK_KV
    HAS_MASK: tl.constexpr,
    COMPENSATE: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,  # tl.dot in fp32, for the interpreter
    PRECISION: tl.constexpr,
):
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_row = (i_m // (BLOCK_Q // BLOCK_M)).to(tl.int64)
    i_hkv = i_h // KV_GROUP
    TILES: tl.constexpr = BLOCK_KV // BLOCK_N

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < SQ
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_do = grad_out + i_b * stride_gb + i_h * stride_gh
    b_q = _load_rows(p_q, o_m, stride_qm, o_d, SQ, D, BLOCK_D, True, WIDEN)
    b_do = _load_rows(p_do, o_m, stride_gm, o_d, SQ, D, BLOCK_D, True, WIDEN)
    b_lse = tl.load(lse2 + i_bh * SQ + o_m, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta + i_bh * SQ + o_m, mask=m_m, other=0.0)
    if TMA:
        p_k, p_v = k, v
    else:
        p_k = k + i_b * stride_kb + i_hkv * stride_kh
        p_v = v + i_b * stride_vb + i_hkv * stride_vh
    i_b32, i_h32 = i_b.to(tl.int32), i_hkv.to(tl.int32)

    n_blocks = tl.cdiv(SK, BLOCK_KV)
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_row * stride_cm)
    count = tl.minimum(count, n_blocks)
    # A dense row ignores its indices: the load below then yields the position itself.
    n_listed = tl.where(count == n_blocks, 0, count)
    p_ids = indices + i_b * stride_ib + i_h * stride_ih + i_row * stride_im
    i_kv = tl.load(p_ids, mask=n_listed > 0, other=0)
    scale2 = tl.cast(scale, tl.float32) * 1.4426950408889634

    b_dq = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    if COMPENSATE:
        b_weight = tl.load(weight + i_b * stride_wb)
        n_means = tl.where((count < n_blocks) & (b_weight > 0.0), n_blocks, 0)
        first_mean = (i_b * (H // KV_GROUP) + i_hkv) * n_blocks * D
        p_kept = kept + i_b * stride_eb + i_h * stride_eh + i_row * stride_em
        for start in range(0, n_means, BLOCK_J):
            o_j = start + tl.arange(0, BLOCK_J)
            b_k = _load_rows(mean_k + first_mean, o_j, D, o_d, n_blocks, D, BLOCK_D, True, WIDEN)
            b_v = _load_rows(mean_v + first_mean, o_j, D, o_d, n_blocks, D, BLOCK_D, True, WIDEN)
            b_bias = _mean_bias(n_valid + i_b * stride_nb, b_weight, p_kept, o_j, n_blocks)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_J]
            b_p = tl.exp2(tl.fma(b_s, scale2, b_bias[None, :] - b_lse[:, None]))
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    for i_t in range(count * TILES):
        i_next = (i_t + 1) // TILES
        i_kv_next = tl.load(p_ids + i_next, mask=i_next < n_listed, other=i_next)
        first = i_kv * BLOCK_KV + (i_t % TILES) * BLOCK_N
        o_key = first + o_n
        if TMA:
            b_k = _described_rows(k, i_b32, i_h32, first, BLOCK_N, BLOCK_D, WIDEN)
            b_v = _described_rows(v, i_b32, i_h32, first, BLOCK_N, BLOCK_D, WIDEN)
        else:
            b_k = _load_rows(p_k, o_key, stride_kn, o_d, SK, D, BLOCK_D, RAGGED, WIDEN)
            b_v = _load_rows(p_v, o_key, stride_vn, o_d, SK, D, BLOCK_D, RAGGED, WIDEN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        b_p = tl.exp2(tl.fma(b_s, scale2, -b_lse[:, None]))
        if RAGGED or HAS_MASK:
            m_key = o_key < SK
            if HAS_MASK:
                m_key = tl.load(key_mask + i_b * stride_mb + o_key, mask=m_key, other=0) != 0
            b_p = tl.where(m_key[None, :], b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        i_kv = i_kv_next

    b_dq = b_dq * tl.cast(scale, tl.float32)
    p_dq = dq + (i_bh * SQ + o_m)[:, None] * D + o_d[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])


@triton.jit
def _dk_dv(
    q,  # [B, H, Sq, D], last stride 1, as of k, v, grad_out; with TMA a descriptor, blocks [1, 1, BLOCK_M, BLOCK_D]
    k,  # [B, Hkv, Sk, D]
    v,  # [B, Hkv, Sk, D]
    grad_out,  # [B, H, Sq, D]; with TMA a descriptor, as of q
    lse2,  # fp32 [B, H, Sq] contiguous, of `_row_terms`, as delta
    delta,
    counts,  # int32 [B', H', Mk] contiguous, the transposed plan
    indices,  # int32 [B', H', Mk, Mq] contiguous
    key_mask,  # bool [B'', Sk], last stride 1; not read without HAS_MASK
    dmean_k,  # fp32 [B, Hkv, Mk, D] contiguous, added to each key of the block; not read without COMPENSATE
    dmean_v,  # fp32 [B, Hkv, Mk, D] contiguous
    dk,  # [B, Hkv, Sk, D] contiguous
    dv,
    scale,
    H,
    KV_GROUP,  # H / Hkv
    SQ,
    SK,
    MQ,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_cb,  # in rows of the transposed plan, as the next
    stride_ch,
    stride_mb,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,  # SQ is not a multiple of BLOCK_Q
    HAS_MASK: tl.constexpr,
    COMPENSATE: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    n_kv = H // KV_GROUP
    i_b, i_hkv = i_bh // n_kv, i_bh % n_kv
    i_kv = (i_n // (BLOCK_KV // BLOCK_N)).to(tl.int64)
    n_blocks = tl.cdiv(SK, BLOCK_KV)
    TILES: tl.constexpr = BLOCK_Q // BLOCK_M

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < SK
    i_b32 = i_b.to(tl.int32)
    p_k = k + i_b * stride_kb + i_hkv * stride_kh
    p_v = v + i_b * stride_vb + i_hkv * stride_vh
    b_k = _load_rows(p_k, o_n, stride_kn, o_d, SK, D, BLOCK_D, True, WIDEN)
    b_v = _load_rows(p_v, o_n, stride_vn, o_d, SK, D, BLOCK_D, True, WIDEN)
    scale2 = tl.cast(scale, tl.float32) * 1.4426950408889634

    b_dk = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    b_dv = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for i_g in range(KV_GROUP):
        i_h = i_hkv * KV_GROUP + i_g
        i_row = i_b * stride_cb + i_h * stride_ch + i_kv
        count = tl.load(counts + i_row)
        p_ids = indices + i_row * MQ
        if TMA:
            p_q, p_do = q, grad_out
        else:
            p_q = q + i_b * stride_qb + i_h * stride_qh
            p_do = grad_out + i_b * stride_gb + i_h * stride_gh
        i_h32 = i_h.to(tl.int32)
        p_lse = lse2 + (i_b * H + i_h) * SQ
        p_delta = delta + (i_b * H + i_h) * SQ
        i_q = tl.load(p_ids)
        for i_t in tl.range(count * TILES, disable_licm=TMA):
            i_next = (i_t + 1) // TILES
            i_q_next = tl.load(p_ids + i_next, mask=i_next < count, other=0)
            first = i_q * BLOCK_Q + (i_t % TILES) * BLOCK_M
            o_query = first + o_m
            if TMA:
                b_q = _described_rows(q, i_b32, i_h32, first, BLOCK_M, BLOCK_D, WIDEN)
                b_do = _described_rows(grad_out, i_b32, i_h32, first, BLOCK_M, BLOCK_D, WIDEN)
            else:
                b_q = _load_rows(p_q, o_query, stride_qm, o_d, SQ, D, BLOCK_D, RAGGED, WIDEN)
                b_do = _load_rows(p_do, o_query, stride_gm, o_d, SQ, D, BLOCK_D, RAGGED, WIDEN)
            if RAGGED:
                b_lse = tl.load(p_lse + o_query, mask=o_query < SQ, other=float("inf"))
                b_delta = tl.load(p_delta + o_query, mask=o_query < SQ, other=0.0)
            else:
                b_lse = tl.load(p_lse + o_query)
                b_delta = tl.load(p_delta + o_query)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            b_p = tl.exp2(tl.fma(b_s, scale2, -b_lse[None, :]))
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
            i_q = i_q_next

    b_dk = b_dk * tl.cast(scale, tl.float32)
    m_d = o_d < D
    if COMPENSATE:
        p_mean = (i_bh * n_blocks + i_kv) * D + o_d
        b_dk += tl.load(dmean_k + p_mean, mask=m_d, other=0.0)[None, :]
        b_dv += tl.load(dmean_v + p_mean, mask=m_d, other=0.0)[None, :]
    if HAS_MASK:
        m_key = tl.load(key_mask + i_b * stride_mb + o_n, mask=m_n, other=0) != 0
        b_dk = tl.where(m_key[:, None], b_dk, 0.0)
        b_dv = tl.where(m_key[:, None], b_dv, 0.0)
    o_out = (i_bh * SK + o_n)[:, None] * D + o_d[None, :]
    m_out = m_n[:, None] & m_d[None, :]
    tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=m_out)
    tl.store(dv + o_out, b_dv.to(dv.dtype.element_ty), mask=m_out)
