"""Triton forward kernel of block-sparse attention.

    out[i] = sum_j softmax_j(scale * q_i . k_j) v_j,  lse[i] = log sum_j exp(scale * q_i . k_j)

One program computes `BLOCK_M` queries of one head of one sample: it walks the row's active key blocks in tiles of
`BLOCK_N` keys with the online softmax of FlashAttention-2 (Dao 2023, algorithm 1), in powers of two with log2(e) folded
into the scale, and accumulates in fp32. The id of the next block is loaded one tile ahead.

Blocks whose keys all count come in a loop of their own without any masking. The last block where it is ragged, and
whatever a row lists after it, go through a second loop that selects; with a key mask all blocks do. Planners list the
ragged block last; a row of `select_blocks` has forced blocks first and goes through the second loop from it on.

With ORDERED the heavy rows of all heads start first (`schedule_triton`). With SPLITS > 1 a row's tiles are shared by
several programs, each writes its own out and lse, and `splits_triton` merges them.

With QK8 queries, keys and mean keys are int8 with a scale for each row (`quantise`), and their products are exact.

With TMA keys and values are host tensor descriptors, read by the copy engine of sm_90 and newer: 10 to 46 registers
fewer. Triton's automatic warp specialisation is no help on sm_90: 3.9 ignores it here with 8 warps and its pass fails
with 4.

With GATHER the tokens of the plan are places, and `places` has the row of q, k, v, key_mask, out and lse of each: a
token order without permuted copies. The copy engine can't gather rows of four dimensions, so it excludes TMA.

With COMPENSATE a loop over the mean keys of all blocks comes first, `BLOCK_J` of them at a time; those of the kept
blocks are hidden by a packed bit each (`means`). Dense rows and samples of weight 0 skip that loop.

fp32 inputs use `input_precision="tf32x3"`: three TF32 products on tensor cores, about the precision of fp32.
The interpreter's `tl.dot` is wrong for bf16, so operands are widened there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows_triton import _block_at, _place_of_item, _row_of_plan, _rows, _rows_at


@triton.jit
def _scores(b_q, b_k, b_qs, p_ks, o_k, m_k, MASKED: tl.constexpr, QK8: tl.constexpr, PRECISION: tl.constexpr):
    """fp32 [BLOCK_M, n] of queries and of keys b_k [n, D]; with QK8 times the scales of rows b_qs and of p_ks + o_k."""
    if QK8:
        if MASKED:
            b_ks = tl.load(p_ks + o_k, mask=m_k, other=0.0)
        else:
            b_ks = tl.load(p_ks + o_k)
        return tl.dot(b_q, b_k.T, out_dtype=tl.int32).to(tl.float32) * b_qs[:, None] * b_ks[None, :]
    else:
        return tl.dot(b_q, b_k.T, input_precision=PRECISION)


@triton.jit
def _accumulate(b_s, b_v, b_max, b_sum, b_acc, scale2, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: scores b_s [BLOCK_M, n], times scale2 in units of log2, and values b_v [n, D].

    GUARD where all scores so far may be -inf: -inf - -inf must not become NaN.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale2)
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new) if GUARD else b_new
    b_p = tl.exp2(tl.fma(b_s, scale2, -b_base[:, None]))
    b_scale = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_acc


@triton.jit
def _block_sparse_forward(
    q,  # [B, H, Sq, D], last stride 1, as of k and v
    k,  # [B, Hkv, Sk, D]; with TMA a descriptor of it with blocks [1, 1, BLOCK_N, BLOCK_D], as v
    v,  # [B, Hkv, Sk, D]
    q_scale,  # fp32 [B, H, Sq] contiguous; this and the next two are not read without QK8
    k_scale,  # fp32 [B, Hkv, Sk] contiguous
    mean_scale,  # fp32 [B, Hkv, Mk] contiguous
    counts,  # int32 [B', H', Mq]
    indices,  # int32 [B', H', Mq, W], last stride 1
    order,  # int32 [Mq + 1] of `heavy_first`; not read without ORDERED
    places,  # int32 [S], the row of each place; not read without GATHER
    key_mask,  # bool [B'', Sk], last stride 1, by row; not read without HAS_MASK
    mean_k,  # [B, Hkv, Mk, D] contiguous; this and the next four are not read without COMPENSATE
    mean_v,  # [B, Hkv, Mk, D] contiguous
    n_valid,  # int32 [B'', Mk], valid keys of each block
    weight,  # fp32 [B or 1]
    kept,  # int32 [B', H', Mq, ceil(Mk / 32)], a bit per block
    out,  # [SPLITS, B, H, Sq, D] contiguous
    lse,  # fp32 [SPLITS, B, H, Sq] contiguous
    scale,
    H,
    KV_GROUP,  # H / Hkv
    SQ,
    SK,
    W,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
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
    ORDERED: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    QK8: tl.constexpr,  # q, k and mean_k are int8
    WIDEN: tl.constexpr,  # tl.dot in fp32, for the interpreter
    PRECISION: tl.constexpr,
):
    n_rows, TILES_Q = tl.cdiv(SQ, BLOCK_Q), tl.constexpr(BLOCK_Q // BLOCK_M)
    n_heavy = 0
    if ORDERED:
        n_heavy = tl.load(order)
    i_bh, i_m = _place_of_item(tl.program_id(0), tl.num_programs(0), n_heavy, n_rows, TILES_Q)
    i_row = i_m // TILES_Q
    if ORDERED:
        i_row = tl.load(order + 1 + i_row)
        i_m = i_row * TILES_Q + i_m % TILES_Q
    i_row = i_row.to(tl.int64)
    BH = tl.num_programs(0) // (n_rows * TILES_Q)
    i_b, i_h = i_bh // H, i_bh % H
    i_hkv = i_h // KV_GROUP
    TILES: tl.constexpr = BLOCK_KV // BLOCK_N

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_m = o_m < SQ
    m_d = o_d < D

    r_m = _rows_at(places, o_m, SQ) if GATHER else o_m  # [BLOCK_M]
    p_q = q + i_b * stride_qb + i_h * stride_qh + r_m.to(tl.int64)[:, None] * stride_qm + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    if TMA:
        p_k, p_v = k, v
    else:
        p_k = k + i_b * stride_kb + i_hkv * stride_kh
        p_v = v + i_b * stride_vb + i_hkv * stride_vh
    i_b32, i_h32 = i_b.to(tl.int32), i_hkv.to(tl.int32)
    WIDEN_K: tl.constexpr = WIDEN and not QK8
    if WIDEN_K:
        b_q = b_q.to(tl.float32)
    i_kvh = i_b * (H // KV_GROUP) + i_hkv
    b_qs = 1.0
    p_ks = k_scale + i_kvh * SK
    if QK8:
        b_qs = tl.load(q_scale + i_bh * SQ + r_m, mask=m_m, other=0.0)

    n_blocks = tl.cdiv(SK, BLOCK_KV)
    count, n_listed = _row_of_plan(counts + i_b * stride_cb + i_h * stride_ch + i_row * stride_cm, n_blocks, W)
    p_ids = indices + i_b * stride_ib + i_h * stride_ih + i_row * stride_im
    scale2 = tl.cast(scale, tl.float32) * 1.4426950408889634

    n_full = count
    if RAGGED and not HAS_MASK:
        first_partial = SK // BLOCK_KV  # the block with keys that do not count
        n_full = tl.where(n_listed > 0, count, tl.minimum(count, first_partial))
        o_w = tl.arange(0, 256)
        for start in range(0, n_listed, 256):
            b_ids = tl.load(p_ids + start + o_w, mask=start + o_w < n_listed, other=0)
            m_w = (b_ids >= first_partial) & (start + o_w < n_listed)
            n_full = tl.minimum(n_full, tl.min(tl.where(m_w, start + o_w, n_blocks), 0))

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)  # in units of log2
    b_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    b_acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    i_split = tl.program_id(1)
    if COMPENSATE:
        b_weight = tl.load(weight + i_b * stride_wb)
        n_means = tl.where((count < n_blocks) & (b_weight > 0.0) & (i_split == 0), n_blocks, 0)
        first_mean = i_kvh * n_blocks * D
        p_kept = kept + i_b * stride_eb + i_h * stride_eh + i_row * stride_em
        for start in range(0, n_means, BLOCK_J):
            o_j = start + tl.arange(0, BLOCK_J)  # [BLOCK_J]
            m_j = o_j < n_blocks
            p_mean = first_mean + o_j.to(tl.int64) * D
            b_k = tl.load(mean_k + p_mean[:, None] + o_d[None, :], mask=m_j[:, None] & m_d[None, :], other=0.0)
            b_v = tl.load(mean_v + p_mean[:, None] + o_d[None, :], mask=m_j[:, None] & m_d[None, :], other=0.0)
            if WIDEN_K:
                b_k = b_k.to(tl.float32)
            if WIDEN:
                b_v = b_v.to(tl.float32)
            b_s = _scores(b_q, b_k, b_qs, mean_scale + i_kvh * n_blocks, o_j, m_j, True, QK8, PRECISION)
            b_n = tl.load(n_valid + i_b * stride_nb + o_j, mask=m_j, other=0)
            b_bits = tl.load(p_kept + o_j // 32, mask=m_j, other=-1)
            m_j = (((b_bits >> (o_j % 32)) & 1) == 0) & (b_n > 0)
            b_bias = tl.where(m_j, tl.log2(b_n.to(tl.float32) * b_weight), float("-inf"))
            b_s = tl.fma(b_s, scale2, tl.broadcast_to(b_bias[None, :], [BLOCK_M, BLOCK_J]))
            b_max, b_sum, b_acc = _accumulate(b_s, b_v, b_max, b_sum, b_acc, 1.0, True, PRECISION)

    # This program's tiles: [begin, middle) of full blocks, [middle, end) of others.
    begin = count * TILES * i_split // SPLITS
    end = count * TILES * (i_split + 1) // SPLITS
    middle = begin
    if not HAS_MASK:
        middle = tl.minimum(tl.maximum(n_full * TILES, begin), end)
    i_kv = _block_at(p_ids, begin // TILES, n_listed, n_blocks)
    r_n = o_n
    if GATHER:
        r_n = _rows_at(places, i_kv * BLOCK_KV + (begin % TILES) * BLOCK_N + o_n, SK)
    for i_t in range(begin, middle):
        i_kv_next = _block_at(p_ids, (i_t + 1) // TILES, n_listed, n_blocks)
        first = i_kv * BLOCK_KV + (i_t % TILES) * BLOCK_N
        r_key = r_n if GATHER else first + o_n
        b_k = _rows(
            *(k, i_b32, i_h32, p_k, first, stride_kn, SK, o_n, r_key, o_d),
            *(D, BLOCK_N, BLOCK_D, False, GATHER, TMA, WIDEN_K),
        )
        b_v = _rows(
            *(v, i_b32, i_h32, p_v, first, stride_vn, SK, o_n, r_key, o_d),
            *(D, BLOCK_N, BLOCK_D, False, GATHER, TMA, WIDEN),
        )
        b_s = _scores(b_q, b_k, b_qs, p_ks, r_key, True, False, QK8, PRECISION)  # [BLOCK_M, BLOCK_N]
        b_max, b_sum, b_acc = _accumulate(b_s, b_v, b_max, b_sum, b_acc, scale2, False, PRECISION)
        i_kv = i_kv_next
        if GATHER:  # one tile ahead: keys must not wait for it
            r_n = _rows_at(places, i_kv * BLOCK_KV + ((i_t + 1) % TILES) * BLOCK_N + o_n, SK)
    if RAGGED or HAS_MASK:
        for i_t in range(middle, end):
            i_kv = _block_at(p_ids, i_t // TILES, n_listed, n_blocks)
            first = i_kv * BLOCK_KV + (i_t % TILES) * BLOCK_N
            m_key = first + o_n < SK
            r_key = _rows_at(places, first + o_n, SK) if GATHER else first + o_n
            b_k = _rows(
                *(k, i_b32, i_h32, p_k, first, stride_kn, SK, o_n, r_key, o_d),
                *(D, BLOCK_N, BLOCK_D, RAGGED, GATHER, TMA, WIDEN_K),
            )
            b_v = _rows(
                *(v, i_b32, i_h32, p_v, first, stride_vn, SK, o_n, r_key, o_d),
                *(D, BLOCK_N, BLOCK_D, RAGGED, GATHER, TMA, WIDEN),
            )
            b_s = _scores(b_q, b_k, b_qs, p_ks, r_key, m_key, True, QK8, PRECISION)
            if HAS_MASK:
                m_key = tl.load(key_mask + i_b * stride_mb + r_key, mask=m_key, other=0) != 0
            b_s = tl.where(m_key[None, :], b_s, float("-inf"))
            b_max, b_sum, b_acc = _accumulate(b_s, b_v, b_max, b_sum, b_acc, scale2, True, PRECISION)

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # no key: out 0, lse -inf
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    b_acc = b_acc / b_sum[:, None]
    i_out = (i_split.to(tl.int64) * BH + i_bh) * SQ + r_m
    tl.store(out + i_out[:, None] * D + o_d[None, :], b_acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    tl.store(lse + i_out, b_lse, mask=m_m)
