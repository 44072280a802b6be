"""Triton kernel of `dynamicrad::pool_blocks`, and its launchers.

One program computes the mean of one block of one head of one sample: it adds tiles of `BLOCK_S` tokens in fp32
and divides by the block's number of valid tokens. It reads x once and is bound by that. On the same way it computes
a second moment of each channel, if that is wanted (`pool_cpu` has the formulas, and why they are stable).
The interpreter truncates fp32 to bf16 instead of rounding it, so the means stay fp32 there until they are stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, wrap_triton


@triton.jit
def _pool_blocks(
    x,  # [B, H, S, D], last stride 1
    counts,  # int32 [B', M] contiguous
    mask,  # bool [B', S], last stride 1; not read without HAS_MASK
    wanted,  # bool [1]; not read without HAS_WANTED
    mean,  # [B, H, M, D] contiguous; its dtype rounds
    second,  # fp32 [B, H, M, D] contiguous; not written without SECOND
    H,
    S,
    M,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_nb,
    stride_mb,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WANTED: tl.constexpr,
    SECOND: tl.constexpr,  # moment beside the mean: 0 none, 1 the mean square, 2 the variance
):
    i_j = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    # No `&` of a scalar and a block: the interpreter can't load under such a mask.
    n_d = tl.where(tl.load(wanted) != 0, D, 0) if HAS_WANTED else D
    m_d = o_d < n_d

    p_head = x + i_b * stride_xb + i_h * stride_xh + o_d[None, :]
    if SECOND == 2:
        first = i_j * BLOCK  # valid token of the block from which the others are measured
        if HAS_MASK:
            first = i_j * 0 + S
            for start in range(0, BLOCK, BLOCK_S):
                own = i_j * BLOCK + start + o_s
                m_s = (start + o_s < BLOCK) & (own < S)
                m_s = m_s & (tl.load(mask + i_b * stride_mb + own, mask=m_s, other=0) != 0)
                first = tl.minimum(first, tl.min(tl.where(m_s, own, i_j * 0 + S), 0))
        m_from = o_d < tl.where(first < S, n_d, 0)
        b_from = tl.load(p_head + first * stride_xs, mask=m_from[None, :], other=0.0).to(tl.float32)

    b_sum = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_square = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, BLOCK, BLOCK_S):
        own = i_j * BLOCK + start + o_s
        m_s = (start + o_s < BLOCK) & (own < S)
        if HAS_MASK:
            m_s = m_s & (tl.load(mask + i_b * stride_mb + own, mask=m_s, other=0) != 0)
        m_x = m_s[:, None] & m_d[None, :]
        b_x = tl.load(p_head + own[:, None] * stride_xs, mask=m_x, other=0.0).to(tl.float32)
        if SECOND == 2:
            b_x = tl.where(m_x, b_x - b_from, 0.0)
        b_sum += b_x
        if SECOND > 0:
            b_square += b_x * b_x
    count = tl.maximum(tl.load(counts + i_b * stride_nb + i_j), 1).to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / count
    at = (tl.program_id(1).to(tl.int64) * M + i_j) * D + o_d
    if SECOND > 0:
        b_second = tl.sum(b_square, 0) / count
        if SECOND == 2:
            # What overflowed stays infinite instead of becoming inf - inf.
            centred = tl.maximum(b_second - b_mean * b_mean, 0.0)
            b_second = tl.where(b_second == float("inf"), b_second, centred)
            b_mean += tl.sum(b_from, 0)
        tl.store(second + at, b_second, mask=m_d)
    tl.store(mean + at, b_mean.to(mean.dtype.element_ty), mask=m_d)


KERNELS: tuple[Any, ...] = (_pool_blocks,)
MOMENTS = ("", "square", "variance")  # positions are the values of SECOND


def tile_rows(dim: int, moment: str) -> int:
    """Tokens of a tile: with a second sum, fewer of large heads, so that both stay in registers."""
    return 16 if moment and dim > 128 else 32


def launch_pooling(
    x: torch.Tensor,
    counts: torch.Tensor,
    block: int,
    kv_mask: torch.Tensor | None = None,
    wanted: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Means [B, H, M, D] of the blocks of x; `counts` int32 [B' or 1, M] of `blocks.valid_counts`.

    dtype: of the means, that of x if None. Where `wanted` bool [1] is given and False, x is not read and the means are
    left uninitialised.
    """
    return launch_moments(x, counts, block, kv_mask, wanted, "", dtype)[0]


def launch_moments(
    x: torch.Tensor,
    counts: torch.Tensor,
    block: int,
    kv_mask: torch.Tensor | None,
    wanted: torch.Tensor | None,
    moment: str,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means as of `launch_pooling`, and fp32 [B, H, M, D] a `moment` (of MOMENTS) of each channel.

    Of moment "" there is none; the second result is of no use then.
    """
    batch, heads, length, dim = x.shape
    n_blocks, dtype = counts.shape[1], dtype or x.dtype
    x = x if x.stride(-1) == 1 else x.contiguous()
    mean = x.new_empty((batch, heads, n_blocks, dim), dtype=torch.float32 if INTERPRETED else dtype)
    second = x.new_empty(mean.shape, dtype=torch.float32) if moment else mean
    mask = counts if kv_mask is None else kv_mask.contiguous()
    wrap_triton(_pool_blocks)[(n_blocks, batch * heads)](
        x,
        counts,
        mask,
        counts if wanted is None else wanted,
        mean,
        second,
        heads,
        length,
        n_blocks,
        *(x.stride(0), x.stride(1), x.stride(2)),
        n_blocks if counts.shape[0] > 1 else 0,
        length if kv_mask is not None and kv_mask.shape[0] > 1 else 0,
        D=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK=block,
        BLOCK_S=min(tile_rows(dim, moment), triton.next_power_of_2(block)),
        HAS_MASK=kv_mask is not None,
        HAS_WANTED=wanted is not None,
        SECOND=MOMENTS.index(moment),
        num_warps=4,
    )
    return mean.to(dtype), second
