"""Rows shared by several programs (split-KV): how many, and the kernel that merges what they wrote.

    lse = log sum_s exp(lse_s),  out = sum_s exp(lse_s - lse) out_s

For launches with fewer programs than the device has multiprocessors: few heads, or few queries over many keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import wrap_triton

MAX_SPLITS = 8
MIN_BLOCKS = 4  # that a split reads, at least


@triton.jit
def _merge_splits(
    parts,  # fp32 [SPLITS, N, D] contiguous
    part_lse,  # fp32 [SPLITS, N] contiguous
    out,  # [N, D] contiguous
    lse,  # fp32 [N] contiguous
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < N
    m_md = m_m[:, None] & (o_d < D)[None, :]
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for i in range(SPLITS):
        b_top = tl.maximum(b_top, tl.load(part_lse + i * N + o_m, mask=m_m, other=float("-inf")))
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(SPLITS):
        b_w = tl.exp(tl.load(part_lse + i * N + o_m, mask=m_m, other=float("-inf")) - b_base)
        b_sum += b_w
        b_acc += b_w[:, None] * tl.load(parts + (i * N + o_m)[:, None] * D + o_d[None, :], mask=m_md, other=0.0)
    b_acc = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(out + o_m[:, None] * D + o_d[None, :], b_acc.to(out.dtype.element_ty), mask=m_md)
    tl.store(lse + o_m, b_top + tl.log(b_sum), mask=m_m)


def choose_splits(programs: Any, width: Any, multiprocessors: int) -> int:
    """Programs that share a row: 1 where `programs` of whole rows keep the device busy, else up to MAX_SPLITS.

    width: blocks that a row lists. Sizes known only when the graph runs give 1.
    """
    if not (isinstance(programs, int) and isinstance(width, int)) or 2 * programs > multiprocessors:
        return 1
    return max(1, min(MAX_SPLITS, multiprocessors // max(programs, 1), width // MIN_BLOCKS))


def merge_splits(parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill out [B, H, Sq, D] and lse fp32 [B, H, Sq] from parts fp32 [S, B, H, Sq, D] and part_lse [S, B, H, Sq]."""
    dim, number = out.shape[-1], lse.numel()
    sizes = {"D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_M": 32, "SPLITS": parts.shape[0]}
    wrap_triton(_merge_splits)[(triton.cdiv(number, 32),)](parts, part_lse, out, lse, number, **sizes)
