"""The work of a launch as a list: for each tile of queries what its program needs to know, found out beforehand.

A program of the Gluon kernels takes several items one after the other; its producer is ahead with the next one. Looked
up there, an item would cost a chain of loads (order, count, ids) before the first key could be fetched.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import row_strides, shared_strides
from .attention_arguments import Attention, Means
from .rows_triton import _place_of_item, _row_of_plan
from .schedule_triton import heavy_first
from .tiles import Tile

FIELDS = ("b", "h", "h_kv", "first_query", "n_means", "n_full", "n_tiles", "n_listed", "ids", "kept", "mask", "valid",
          "weight")  # fmt: skip
"""Of an item: sample, head, its key head, first query; tiles of mean keys, of blocks whose keys all count, of all
blocks; ids that the row lists; where in their tensors its ids, bits of kept blocks, key mask, counts of valid keys and
weight of mean keys begin."""
WIDTH = 16
"""int32 that an item takes: 64 bytes."""


@triton.jit
def _list_work(
    counts,  # int32 [B', H', Mq]
    indices,  # int32 [B', H', Mq, W], last stride 1
    order,  # int32 [Mq + 1] of `heavy_first`; not read without ORDERED
    weight,  # fp32 [B or 1]; not read without COMPENSATE
    work,  # int32 [items, WIDTH] contiguous
    H,
    KV_GROUP,  # H / Hkv
    SQ,
    SK,
    W,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,  # SK is not a multiple of BLOCK_KV
    HAS_MASK: tl.constexpr,
    COMPENSATE: tl.constexpr,
    ORDERED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    TILES: tl.constexpr = BLOCK_KV // BLOCK_N
    TILES_Q: tl.constexpr = BLOCK_Q // BLOCK_M
    item = tl.program_id(0)
    n_heavy = 0
    if ORDERED:
        n_heavy = tl.load(order)
    i_bh, i_m = _place_of_item(item, tl.num_programs(0), n_heavy, tl.cdiv(SQ, BLOCK_Q), TILES_Q)
    i_row = i_m // TILES_Q
    if ORDERED:
        i_row = tl.load(order + 1 + i_row)
        i_m = i_row * TILES_Q + i_m % TILES_Q
    i_b, i_h = (i_bh // H).to(tl.int32), (i_bh % H).to(tl.int32)
    n_blocks = tl.cdiv(SK, BLOCK_KV)
    p_count = counts + i_b.to(tl.int64) * stride_cb + i_h.to(tl.int64) * stride_ch + i_row * stride_cm
    count, n_listed = _row_of_plan(p_count, n_blocks, W)
    ids = i_b * stride_ib + i_h * stride_ih + i_row * stride_im

    n_full = count
    if HAS_MASK:
        n_full = 0
    elif RAGGED:
        first_partial = SK // BLOCK_KV  # the block with keys that do not count
        n_full = tl.where(n_listed > 0, count, tl.minimum(count, first_partial))
        o_w = tl.arange(0, 256)
        for start in range(0, n_listed, 256):
            b_ids = tl.load(indices + ids + start + o_w, mask=start + o_w < n_listed, other=0)
            m_w = (b_ids >= first_partial) & (start + o_w < n_listed)
            n_full = tl.minimum(n_full, tl.min(tl.where(m_w, start + o_w, n_blocks), 0))
    n_means = 0
    if COMPENSATE:
        b_weight = tl.load(weight + i_b * stride_wb)
        n_means = tl.where((count < n_blocks) & (b_weight > 0.0), tl.cdiv(n_blocks, BLOCK_N), 0)

    o = tl.arange(0, WIDTH)
    p_item = work + item * WIDTH
    kept = i_b * stride_eb + i_h * stride_eh + i_row * stride_em
    b_item = tl.where(o == 0, i_b, 0)
    b_item = tl.where(o == 1, i_h, b_item)
    b_item = tl.where(o == 2, i_h // KV_GROUP, b_item)
    b_item = tl.where(o == 3, i_m * BLOCK_M, b_item)
    b_item = tl.where(o == 4, n_means, b_item)
    b_item = tl.where(o == 5, n_full * TILES, b_item)
    b_item = tl.where(o == 6, count * TILES, b_item)
    b_item = tl.where(o == 7, n_listed, b_item)
    b_item = tl.where(o == 8, ids, b_item)
    b_item = tl.where(o == 9, kept, b_item)
    b_item = tl.where(o == 10, i_b * stride_mb, b_item)
    b_item = tl.where(o == 11, i_b * stride_nb, b_item)
    b_item = tl.where(o == 12, i_b * stride_wb, b_item)
    tl.store(p_item + o, b_item)


def list_work(a: Attention, means: Means | None, tile: Tile) -> torch.Tensor:
    """int32 [items, WIDTH]: FIELDS of each tile of queries of each head, heavy rows of all heads first (`heavy_first`).

    a: the op's arguments, checked; its indices and its mask have last stride 1.
    """
    (batch, heads, q_len, _), (kv_heads, kv_len) = a.q.shape, a.k.shape[1:3]
    items = a.kv_counts.shape[2] * (a.block_q // tile.block_m) * batch * heads
    work = torch.empty((items, WIDTH), dtype=torch.int32, device=a.q.device)
    order = heavy_first(a.kv_counts)
    of_mask = 0 if a.kv_mask is None else shared_strides(a.kv_mask, 0)[0]
    of_means: tuple[Any, ...] = (0,) * 5
    if means is not None:
        of_means = (*shared_strides(means.counts, 0), *shared_strides(means.weight, 0), *row_strides(means.bits))
    _list_work[(items,)](
        *(a.kv_counts, a.kv_indices, a.kv_counts if order is None else order),
        *(a.kv_counts if means is None else means.weight, work),
        *(heads, heads // kv_heads, q_len, kv_len, a.kv_indices.shape[3]),
        *(*row_strides(a.kv_counts), *row_strides(a.kv_indices), of_mask, *of_means),
        BLOCK_Q=a.block_q,
        BLOCK_KV=a.block_kv,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        RAGGED=kv_len % a.block_kv != 0,
        HAS_MASK=a.kv_mask is not None,
        COMPENSATE=means is not None,
        ORDERED=order is not None,
        WIDTH=WIDTH,
        num_warps=1,
    )
    return work
