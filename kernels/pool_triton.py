"""Triton kernel of `dynamicrad::pool_blocks`, and its launcher.

One program computes the mean of one block of one head of one sample: it adds tiles of `BLOCK_S` tokens in fp32
and divides by the block's number of valid tokens. It reads x once and is bound by that.
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
):
    i_j = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_d = o_d < D
    if HAS_WANTED:
        m_d = m_d & (tl.load(wanted) != 0)

    b_sum = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, BLOCK, BLOCK_S):
        own = i_j * BLOCK + start + o_s
        m_s = (start + o_s < BLOCK) & (own < S)
        if HAS_MASK:
            m_s = m_s & (tl.load(mask + i_b * stride_mb + own, mask=m_s, other=0) != 0)
        p_x = x + i_b * stride_xb + i_h * stride_xh + own[:, None] * stride_xs + o_d[None, :]
        b_sum += tl.load(p_x, mask=m_s[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    count = tl.load(counts + i_b * stride_nb + i_j)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(count, 1).to(tl.float32)
    p_mean = mean + (tl.program_id(1).to(tl.int64) * M + i_j) * D + o_d
    tl.store(p_mean, b_mean.to(mean.dtype.element_ty), mask=m_d)


KERNELS: tuple[Any, ...] = (_pool_blocks,)


def launch_pooling(
    x: torch.Tensor,
    counts: torch.Tensor,
    block: int,
    kv_mask: torch.Tensor | None = None,
    wanted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Means [B, H, M, D] of the blocks of x; `counts` int32 [B' or 1, M] of `blocks.valid_counts`.

    Where `wanted` bool [1] is given and False, x is not read and the means are left uninitialised.
    """
    batch, heads, length, dim = x.shape
    n_blocks = counts.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    mean = x.new_empty((batch, heads, n_blocks, dim), dtype=torch.float32 if INTERPRETED else x.dtype)
    mask = counts if kv_mask is None else kv_mask.contiguous()
    wrap_triton(_pool_blocks)[(n_blocks, batch * heads)](
        x,
        counts,
        mask,
        counts if wanted is None else wanted,
        mean,
        heads,
        length,
        n_blocks,
        *(x.stride(0), x.stride(1), x.stride(2)),
        n_blocks if counts.shape[0] > 1 else 0,
        length if kv_mask is not None and kv_mask.shape[0] > 1 else 0,
        D=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK=block,
        BLOCK_S=min(32, triton.next_power_of_2(block)),
        HAS_MASK=kv_mask is not None,
        HAS_WANTED=wanted is not None,
        num_warps=4,
    )
    return mean.to(x.dtype)
