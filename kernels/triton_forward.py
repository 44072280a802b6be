"""Triton forward kernel of block-sparse attention, and its launcher.

    out[i] = sum_j softmax_j(scale * q_i . k_j) v_j,  lse[i] = log sum_j exp(scale * q_i . k_j)

One program computes `BLOCK_M` queries of one head of one sample: it walks the row's active key blocks in tiles
of `BLOCK_N` keys with the online softmax of FlashAttention-2 (Dao 2023, algorithm 1), in powers of two with
log2(e) folded into the scale, and accumulates in fp32. The id of the next block is loaded one tile ahead.
Scores are masked only in builds for a ragged last block or a key mask, by a select in every tile; mask bytes
are loaded only from `mask_start` on. A uniform branch around the masking took 50 registers more and spilled on
sm_80 and sm_120.

fp32 inputs use `input_precision="tf32x3"`: three TF32 products on tensor cores, about the precision of fp32.
The interpreter's `tl.dot` is wrong for bf16, so operands are widened there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from .tiles import Tile, choose_tile


@triton.jit
def _block_sparse_forward(
    q,  # [B, H, Sq, D], last stride 1, as of k and v
    k,  # [B, Hkv, Sk, D]
    v,  # [B, Hkv, Sk, D]
    counts,  # int32 [B', H', Mq]
    indices,  # int32 [B', H', Mq, W], last stride 1
    key_mask,  # bool [B'', Sk], last stride 1; not read without HAS_MASK
    out,  # [B, H, Sq, D] contiguous
    lse,  # fp32 [B, H, Sq] contiguous
    scale,
    H,
    KV_GROUP,  # H / Hkv
    SQ,
    SK,
    mask_start,
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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,  # SK is not a multiple of BLOCK_KV
    HAS_MASK: tl.constexpr,
    WIDEN: tl.constexpr,  # tl.dot in fp32, for the interpreter
    PRECISION: tl.constexpr,
):
    i_m = tl.program_id(0)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    i_row = (i_m // (BLOCK_Q // BLOCK_M)).to(tl.int64)
    i_hkv = i_h // KV_GROUP
    TILES: tl.constexpr = BLOCK_KV // BLOCK_N

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_m = o_m < SQ
    m_d = o_d < D

    p_q = q + i_b * stride_qb + i_h * stride_qh + o_m.to(tl.int64)[:, None] * stride_qm + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    p_k = k + i_b * stride_kb + i_hkv * stride_kh
    p_v = v + i_b * stride_vb + i_hkv * stride_vh
    o_k = o_n[None, :] * stride_kn + o_d[:, None]  # [BLOCK_D, BLOCK_N], within a tile
    o_v = o_n[:, None] * stride_vn + o_d[None, :]  # [BLOCK_N, BLOCK_D]
    if WIDEN:
        b_q = b_q.to(tl.float32)

    n_blocks = tl.cdiv(SK, BLOCK_KV)
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_row * stride_cm)
    count = tl.minimum(count, n_blocks)
    # A dense row ignores its indices: the load below then yields the position itself.
    n_listed = tl.where(count == n_blocks, 0, count)
    p_ids = indices + i_b * stride_ib + i_h * stride_ih + i_row * stride_im
    i_kv = tl.load(p_ids, mask=n_listed > 0, other=0)
    scale2 = tl.cast(scale, tl.float32) * 1.4426950408889634

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)  # in units of log2
    b_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    b_acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    for i_t in range(count * TILES):
        i_next = (i_t + 1) // TILES
        i_kv_next = tl.load(p_ids + i_next, mask=i_next < n_listed, other=i_next)
        first = i_kv * BLOCK_KV + (i_t % TILES) * BLOCK_N
        p_k_tile = p_k + first.to(tl.int64) * stride_kn + o_k
        p_v_tile = p_v + first.to(tl.int64) * stride_vn + o_v
        if RAGGED and D < BLOCK_D:
            m_n = first + o_n < SK
            b_k = tl.load(p_k_tile, mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_v = tl.load(p_v_tile, mask=m_n[:, None] & m_d[None, :], other=0.0)
        elif RAGGED:
            m_n = first + o_n < SK
            b_k = tl.load(p_k_tile, mask=m_n[None, :], other=0.0)
            b_v = tl.load(p_v_tile, mask=m_n[:, None], other=0.0)
        elif D < BLOCK_D:
            b_k = tl.load(p_k_tile, mask=m_d[:, None], other=0.0)
            b_v = tl.load(p_v_tile, mask=m_d[None, :], other=0.0)
        else:
            b_k = tl.load(p_k_tile)
            b_v = tl.load(p_v_tile)
        if WIDEN:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)

        b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if RAGGED or HAS_MASK:
            m_key = first + o_n < SK
            if HAS_MASK:
                m_load = m_key & (first + o_n >= mask_start)
                m_key = m_key & (tl.load(key_mask + i_b * stride_mb + first + o_n, mask=m_load, other=1) != 0)
            b_s = tl.where(m_key[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale2)
        # Nothing seen yet and a tile of hidden keys: -inf - -inf must not become NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new) if RAGGED or HAS_MASK else b_new
        b_p = tl.exp2(tl.fma(b_s, scale2, -b_base[:, None]))
        b_scale = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = b_acc * b_scale[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new
        i_kv = i_kv_next

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # no key: out 0, lse -inf
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    b_acc = b_acc / b_sum[:, None]
    i_out = tl.program_id(1).to(tl.int64) * SQ + o_m
    tl.store(out + i_out[:, None] * D + o_d[None, :], b_acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    tl.store(lse + i_out, b_lse, mask=m_m)


INTERPRETED = not isinstance(_block_sparse_forward, triton.runtime.JITFunction)
"""True if this module was loaded with TRITON_INTERPRET=1."""


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_counts: torch.Tensor,
    kv_indices: torch.Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
    kv_mask: torch.Tensor | None = None,
    mask_start: int = 0,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as of the op, already validated. `tile` overrides the table of `tiles`.

    Raises PlanError if the device is too old, or the plan's blocks are not multiples of 16 up to 256.
    """
    batch, heads, q_len, dim = q.shape
    kv_len = k.shape[2]
    if tile is None:
        capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(q.device)
        tile = choose_tile(capability, q.dtype != torch.float32, dim, block_q, block_kv)
    q, k, v, kv_indices = (_unit_last_stride(x) for x in (q, k, v, kv_indices))
    out = q.new_empty((batch, heads, q_len, dim))
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32)
    mask = kv_counts if kv_mask is None else _unit_last_stride(kv_mask)

    def stride(x: torch.Tensor, d: int) -> int:
        return x.stride(d) if x.shape[d] > 1 else 0  # size 1: shared

    kernel = _block_sparse_forward if INTERPRETED else wrap_triton(_block_sparse_forward)
    kernel[(triton.cdiv(q_len, tile.block_m), batch * heads)](
        q,
        k,
        v,
        kv_counts,
        kv_indices,
        mask,
        out,
        lse,
        scale,
        heads,
        heads // k.shape[1],
        q_len,
        kv_len,
        mask_start,
        *(q.stride(0), q.stride(1), q.stride(2)),
        *(k.stride(0), k.stride(1), k.stride(2)),
        *(v.stride(0), v.stride(1), v.stride(2)),
        *(stride(kv_counts, 0), stride(kv_counts, 1), kv_counts.stride(2)),
        *(stride(kv_indices, 0), stride(kv_indices, 1), kv_indices.stride(2)),
        0 if kv_mask is None else stride(mask, 0),
        D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        RAGGED=kv_len % block_kv != 0,
        HAS_MASK=kv_mask is not None,
        WIDEN=INTERPRETED and q.dtype == torch.bfloat16,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse
