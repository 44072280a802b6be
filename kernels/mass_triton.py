"""Triton kernel of `dynamicrad::block_mass`, and its launcher.

One program handles `BLOCK_M` queries of one head of one sample: it holds them, walks all keys in tiles of `BLOCK_N` and
writes one number for each block of keys, so that no score of a pair goes to memory. It is the first half of the
attention kernel: the same tiles, scores in powers of two, and no value. Where a block of queries has several tiles,
their sums are added afterwards.

Tiles whose keys all count come in a loop of their own without masking; with a key mask all tiles go through the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import chip, shared_strides, sizes_of, unit_last_stride, wrap_triton
from .mass_arguments import BlockMass
from .rows_triton import _load_rows
from .tiles import Tile, choose_tile


@triton.jit
def _mass_of_tile(b_q, b_lse, p_k, stride_kn, first, o_n, o_d, SK, p_mask, scale2,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
                  WIDEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N]: exp(scale q . k - lse) of the keys from `first` on; 0 where a key does not count."""
    b_k = _load_rows(p_k, first + o_n, stride_kn, o_d, SK, D, BLOCK_D, MASKED, WIDEN)
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
    b_p = tl.exp2(tl.fma(b_s, scale2, -b_lse[:, None]))
    if MASKED:
        m_n = first + o_n < SK
        if HAS_MASK:
            m_n = tl.load(p_mask + first + o_n, mask=m_n, other=0) != 0
        b_p = tl.where(m_n[None, :], b_p, 0.0)
    return b_p


@triton.jit
def _block_mass(
    q,  # [B, H, Sq, D], last stride 1
    k,  # [B, Hkv, Sk, D], last stride 1
    lse,  # fp32 [B, H, Sq]
    key_mask,  # bool [B', Sk], last stride 1; not read without HAS_MASK
    refresh,  # bool [1]; not read without HAS_REFRESH
    mass,  # fp32 [B, H, ceil(Sq / BLOCK_Q) * BLOCK_Q / BLOCK_M, Mk] contiguous
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
    stride_lb,
    stride_lh,
    stride_lm,
    stride_mb,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KV: tl.constexpr,  # 1: each key is its own block
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,  # the last tile is not full
    HAS_MASK: tl.constexpr,
    HAS_REFRESH: tl.constexpr,
    WIDEN: tl.constexpr,  # operands in fp32: for the interpreter, and for fp32 keys of half precision queries
    PRECISION: tl.constexpr,
):
    if HAS_REFRESH:  # noqa: SIM102  one `if` would load without HAS_REFRESH, too
        if tl.load(refresh) == 0:
            return
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    TILES: tl.constexpr = BLOCK_KV // BLOCK_N if BLOCK_KV > 1 else 1
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b_q = _load_rows(q + i_b * stride_qb + i_h * stride_qh, o_m, stride_qm, o_d, SQ, D, BLOCK_D, True, WIDEN)
    p_lse = lse + i_b * stride_lb + i_h * stride_lh + o_m.to(tl.int64) * stride_lm
    b_lse = tl.load(p_lse, mask=o_m < SQ, other=float("inf"))
    # A query that had no key, or whose lse is not a number, adds nothing.
    b_lse = tl.where(tl.abs(b_lse) < float("inf"), b_lse * 1.4426950408889634, float("inf"))
    p_k = k + i_b * stride_kb + (i_h // KV_GROUP) * stride_kh
    p_mask = key_mask + i_b * stride_mb
    scale2 = tl.cast(scale, tl.float32) * 1.4426950408889634

    n_blocks = tl.cdiv(SK, BLOCK_KV)
    p_out = mass + (i_bh * tl.num_programs(0) + i_m) * n_blocks
    n_tiles = n_blocks * TILES if BLOCK_KV > 1 else tl.cdiv(SK, BLOCK_N)
    n_full = 0 if HAS_MASK else SK // BLOCK_N
    total = tl.cast(0.0, tl.float32)
    for i_t in range(n_full):
        b_p = _mass_of_tile(b_q, b_lse, p_k, stride_kn, i_t * BLOCK_N, o_n, o_d, SK, p_mask, scale2,
                            D, BLOCK_D, False, False, WIDEN, PRECISION)  # fmt: skip
        if BLOCK_KV == 1:
            b_each = tl.sum(b_p, 0)
            tl.store(p_out + i_t * BLOCK_N + o_n, tl.where(b_each == b_each, b_each, 0.0))
        else:
            total = tl.where(i_t % TILES == 0, 0.0, total) + tl.sum(b_p)
            tl.store(p_out + i_t // TILES, tl.where(total == total, total, 0.0), mask=i_t % TILES == TILES - 1)
    if RAGGED or HAS_MASK:
        for i_t in range(n_full, n_tiles):
            b_p = _mass_of_tile(b_q, b_lse, p_k, stride_kn, i_t * BLOCK_N, o_n, o_d, SK, p_mask, scale2,
                                D, BLOCK_D, True, HAS_MASK, WIDEN, PRECISION)  # fmt: skip
            if BLOCK_KV == 1:
                b_each = tl.sum(b_p, 0)
                tl.store(p_out + i_t * BLOCK_N + o_n, tl.where(b_each == b_each, b_each, 0.0),
                         mask=i_t * BLOCK_N + o_n < SK)  # fmt: skip
            else:
                total = tl.where(i_t % TILES == 0, 0.0, total) + tl.sum(b_p)
                tl.store(p_out + i_t // TILES, tl.where(total == total, total, 0.0), mask=i_t % TILES == TILES - 1)


KERNELS: tuple[Any, ...] = (_block_mass,)
EACH_TILE = 64
"""Keys at a time where each of them is its own block."""


def mass_tile(m: BlockMass) -> Tile:
    """That of the attention kernel, for the op's arguments."""
    half = m.q.dtype != torch.float32 and m.k.dtype == m.q.dtype
    return choose_tile(chip(m.q.device), half, m.q.shape[3], m.block_q, EACH_TILE if m.block_kv == 1 else m.block_kv)


def launch_mass(m: BlockMass, refresh: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 [B, H, Mq, Mk] of the op's arguments, already checked; k may be fp32 whatever q is.

    Where `refresh` bool [1] is given and False, q and k are not read and the result is uninitialised.
    Raises PlanError if the device is too old, or blocks are not multiples of 16 up to 256 (or block_kv 1).
    """
    (batch, heads, q_len, _), kv_len = m.q.shape, m.k.shape[2]
    tile = mass_tile(m)
    q, k = unit_last_stride(m.q), unit_last_stride(m.k)
    mask = m.lse if m.kv_mask is None else unit_last_stride(m.kv_mask)
    _, _, n_q, n_kv = m.shape
    tiles = m.block_q // tile.block_m
    parts = m.q.new_empty((batch, heads, n_q * tiles, n_kv), dtype=torch.float32)
    sizes = sizes_of(k)
    wrap_triton(_block_mass)[(n_q * tiles, batch * heads)](
        *(q, k, m.lse, mask, m.lse if refresh is None else refresh, parts),
        *(m.factor, heads, heads // k.shape[1], q_len, kv_len),
        *(*q.stride()[:3], *k.stride()[:3], *m.lse.stride()),
        0 if m.kv_mask is None else shared_strides(mask, 0)[0],
        **(sizes | {"WIDEN": sizes["WIDEN"] or q.dtype != k.dtype}),
        BLOCK_KV=m.block_kv,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        RAGGED=kv_len % tile.block_n != 0 or kv_len % m.block_kv != 0,
        HAS_MASK=m.kv_mask is not None,
        HAS_REFRESH=refresh is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return parts if tiles == 1 else parts.unflatten(2, (n_q, tiles)).sum(3)
