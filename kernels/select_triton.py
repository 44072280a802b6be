"""Triton kernel of `dynamicrad::select_blocks`, and its launcher.

One program handles one query block of one head of one sample. It gathers the mean keys of its candidates, keeps
their scores in registers, chooses, and writes the ids that it keeps, in their order: no score of any pair goes to
memory. The criteria "mass" and "ratio" need the best candidates of a group but no sort: the distance to the group's
best score is a non-negative float, whose bits order like an integer, so 31 halvings find the exact last distance that
is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dynamicrad_compile.errors import PlanError

from ._launch import shared_strides, unit_last_stride, wrap_triton
from .select_arguments import Selection
from .select_criteria import CRITERIA

MAX_WIDTH = 4096  # candidates of a row, which are held in registers


@triton.jit
def _best(key, weight, member, target, limit):
    """Members below the key `limit`, and as many with that key as the target needs, earlier ones first."""
    before = tl.sum(tl.where(key < limit, weight, 0.0), 0)
    tied = member & (key == limit)
    rank = (tl.cumsum(tied.to(tl.int32), 0) - 1).to(tl.float32)
    return (member & (key < limit)) | (tied & (before + rank * weight < target))


@triton.jit
def _select_blocks(
    q_mean,  # [B, H, Mq, D] contiguous
    k_mean,  # [B, Hkv, Mk, D] contiguous
    q_square,  # fp32 [B, H, Mq, D] contiguous; not read without BY_ERROR, nor is k_variance
    k_variance,  # fp32 [B, Hkv, Mk, D] contiguous
    n_keys,  # int32 [B', Mk] contiguous
    counts,  # int32 [B', H', Mq]
    indices,  # int32 [B', H', Mq, W], last stride 1
    forced,  # int32 [B', H', Mq]
    near,  # int32 [B', H', Mq]
    thresholds,  # fp32 [B', 2] contiguous
    refresh,  # bool [1]; not read without HAS_REFRESH
    out_counts,  # int32 [B, H, Mq] contiguous
    out_indices,  # int32 [B, H, Mq, W] contiguous
    scale,
    H,
    KV_GROUP,  # H / Hkv
    MQ,
    MK,
    W,
    stride_nb,
    stride_cb,
    stride_ch,
    stride_cm,
    stride_ib,
    stride_ih,
    stride_im,
    stride_fb,
    stride_fh,
    stride_fm,
    stride_eb,
    stride_eh,
    stride_em,
    stride_tb,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CRITERION: tl.constexpr,  # position in CRITERIA
    BY_ERROR: tl.constexpr,
    HAS_REFRESH: tl.constexpr,
):
    if HAS_REFRESH:  # noqa: SIM102  one `if` would load without HAS_REFRESH, too
        if tl.load(refresh) == 0:
            return
    i_m = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_w = tl.arange(0, BLOCK_W)  # [BLOCK_W]

    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_m * stride_cm)
    dense = count >= MK
    n = tl.where(dense, 0, tl.minimum(tl.maximum(count, 0), W))  # nothing is chosen in a dense row
    m_w = o_w < n
    n_forced = tl.load(forced + i_b * stride_fb + i_h * stride_fh + i_m * stride_fm)
    n_near = tl.load(near + i_b * stride_eb + i_h * stride_eh + i_m * stride_em)
    b_keep = m_w & (o_w < n_forced)
    is_near = m_w & (o_w >= n_forced) & (o_w < n_near)
    is_far = m_w & (o_w >= n_forced) & (o_w >= n_near)
    b_id = tl.load(indices + i_b * stride_ib + i_h * stride_ih + i_m * stride_im + o_w, mask=m_w, other=0)
    b_id = tl.minimum(tl.maximum(b_id, 0), MK - 1)

    if n > n_forced:
        at_q = (i_bh * MQ + i_m) * D
        at_k = (i_b * (H // KV_GROUP) + i_h // KV_GROUP) * MK * D
        b_s = tl.zeros([BLOCK_W], tl.float32)
        b_e = tl.zeros([BLOCK_W], tl.float32)
        for start in range(0, D, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            m_k = m_w[:, None] & m_d[None, :]
            o_k = at_k + b_id[:, None] * D + o_d[None, :]
            b_q = tl.load(q_mean + at_q + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_k = tl.load(k_mean + o_k, mask=m_k, other=0.0)
            b_s += tl.sum(b_k.to(tl.float32) * b_q[None, :], 1)
            if BY_ERROR:  # what overflowed is finite, so that 0 times it is 0
                b_q = tl.minimum(tl.load(q_square + at_q + o_d, mask=m_d, other=0.0), 3.0e38)
                b_k = tl.minimum(tl.load(k_variance + o_k, mask=m_k, other=0.0), 3.0e38)
                b_e += tl.sum(b_k * b_q[None, :], 1)
        b_n = tl.load(n_keys + i_b * stride_nb + b_id, mask=m_w, other=0)
        b_s = b_s * scale + tl.log(b_n.to(tl.float32))
        # What is not a number counts as hidden, what overflowed as finite, so that differences are numbers.
        seen = m_w & (b_n > 0) & (b_s == b_s)
        if BY_ERROR:  # limits as in select_cpu
            b_s = tl.maximum(b_s + tl.log(tl.minimum(b_e, 3.0e38)), -2.0e37)
            b_s = tl.where(b_e < 1.2e-38, -3.0e37, b_s)
        b_s = tl.where(seen, tl.minimum(b_s, 3.0e38), float("-inf"))

        top = tl.max(b_s, 0)
        t_near = tl.load(thresholds + i_b * stride_tb)
        t_far = tl.load(thresholds + i_b * stride_tb + 1)
        if CRITERION == 0:
            base = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(tl.exp(b_s - base), 0)
            b_log = b_s - base - tl.log(tl.where(total > 0.0, total, 1.0)) + tl.log(n.to(tl.float32))
            b_keep = b_keep | (is_near & (b_log >= t_near)) | (is_far & (b_log >= t_far))
        else:
            # Each group from its own best score on, or the masses of a faint one would vanish.
            top_near = tl.max(tl.where(is_near, b_s, float("-inf")), 0)
            top_far = tl.max(tl.where(is_far, b_s, float("-inf")), 0)
            b_top = tl.where(is_far, top_far, top_near)
            b_below = tl.where(b_top == float("-inf"), 0.0, b_top) - b_s  # >= 0 in both groups
            b_key = b_below.to(tl.int32, bitcast=True)
            b_one = tl.exp(-b_below) if CRITERION == 1 else tl.full([BLOCK_W], 1.0, tl.float32)
            w_near = tl.where(is_near, b_one, 0.0)
            w_far = tl.where(is_far, b_one, 0.0)
            target_near = tl.sum(w_near, 0) * t_near
            target_far = tl.sum(w_far, 0) * t_far
            if CRITERION == 2:
                target_near = tl.ceil(target_near)
                target_far = tl.ceil(target_far)
            # The largest key below which a group's weight stays short of its target.
            k_near = tl.cast(0, tl.int32)
            k_far = tl.cast(0, tl.int32)
            for i in range(31):
                bit = tl.cast(1, tl.int32) << (30 - i)
                short_near = tl.sum(tl.where(b_key < (k_near | bit), w_near, 0.0), 0) < target_near
                short_far = tl.sum(tl.where(b_key < (k_far | bit), w_far, 0.0), 0) < target_far
                k_near = tl.where(short_near, k_near | bit, k_near)
                k_far = tl.where(short_far, k_far | bit, k_far)
            k_near = tl.where(t_near >= 1.0, 0x7FFFFFFF, k_near)
            k_far = tl.where(t_far >= 1.0, 0x7FFFFFFF, k_far)
            b_keep = b_keep | _best(b_key, w_near, is_near, target_near, k_near)
            b_keep = b_keep | _best(b_key, w_far, is_far, target_far, k_far)

        # At least the best one, the earlier of equals.
        first = tl.min(tl.where(m_w & (b_s == top), o_w, BLOCK_W), 0)
        first = tl.where(tl.sum(b_keep.to(tl.int32), 0) == 0, first, BLOCK_W)
        b_keep = b_keep | (m_w & (o_w == first))

    kept = tl.sum(b_keep.to(tl.int32), 0)
    o_out = tl.cumsum(b_keep.to(tl.int32), 0) - 1
    p_out = out_indices + (i_bh * MQ + i_m) * W
    tl.store(p_out + o_out, b_id, mask=b_keep)
    tl.store(p_out + o_w, tl.zeros([BLOCK_W], tl.int32), mask=(o_w >= kept) & (o_w < W))
    tl.store(out_counts + i_bh * MQ + i_m, tl.where(dense, MK, kept))


KERNELS: tuple[Any, ...] = (_select_blocks,)


def shape_of_program(width: int, dim: int, rank: str = "mass") -> tuple[int, int, int]:
    """(BLOCK_W, BLOCK_D, num_warps) for rows of `width` candidates: at most 64 elements of key blocks a thread."""
    block_w = max(32, triton.next_power_of_2(width))
    warps = min(16, max(1, block_w // 256))
    # By error as many of the variances; 16 warps have 128 registers a thread, others 255.
    held = 64 if rank == "mass" else 32 if warps < 16 else 16
    block_d = min(triton.next_power_of_2(dim), max(2, held * 32 * warps // block_w))
    return block_w, min(block_d, 32), warps


def launch_select(
    s: Selection,
    q_mean: torch.Tensor,
    k_mean: torch.Tensor,
    n_keys: torch.Tensor,
    out_counts: torch.Tensor,
    out_indices: torch.Tensor,
    refresh: torch.Tensor | None = None,
    seconds: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fill out_counts int32 [B, H, Mq] and out_indices int32 [B, H, Mq, W], both contiguous.

    Arguments as of the op, already checked; the means come from `pool_blocks`. seconds: for rank "error" the mean
    squares of q_mean's shape and the variances of k_mean's, fp32. Where `refresh` bool [1] is given and False nothing
    is written. Raises PlanError if rows are too wide for a program.
    """
    (batch, heads, n_q, dim), width = q_mean.shape, s.kv_indices.shape[-1]
    if width > MAX_WIDTH:
        raise PlanError(f"a row may have at most {MAX_WIDTH} candidates on CUDA, got {width}. Take larger blocks.")
    block_w, block_d, warps = shape_of_program(width, dim, s.rank)
    indices, thresholds = unit_last_stride(s.kv_indices), s.thresholds.contiguous()
    tables = (s.kv_counts, indices, s.kv_forced, s.kv_near)
    strides = [stride for table in tables for stride in shared_strides(table, 0, 1, 2)]
    wrap_triton(_select_blocks)[(n_q, batch * heads)](
        *(q_mean, k_mean, *(seconds or (q_mean, k_mean)), n_keys),
        *(*tables, thresholds, s.kv_counts if refresh is None else refresh),
        *(out_counts, out_indices, s.factor, heads, heads // k_mean.shape[1], n_q, k_mean.shape[2], width),
        *(*shared_strides(n_keys, 0), *strides, *shared_strides(thresholds, 0)),
        D=dim,
        BLOCK_D=block_d,
        BLOCK_W=block_w,
        CRITERION=CRITERIA.index(s.criterion),
        BY_ERROR=seconds is not None,
        HAS_REFRESH=refresh is not None,
        num_warps=warps,
    )
