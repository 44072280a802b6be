"""Triton kernels of `dynamicrad::search_blocks`: from masses of all pairs of blocks to the choice.

Scores are non-negative floats, whose bits order like integers (keys), so the last one that a head keeps is found in 31
halvings, without a sort; blocks that are kept whatever they hold have the largest key. Rows and heads are walked in
chunks, so that no kernel depends on how many blocks there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

ALWAYS = tl.constexpr(0x7FFFFFFF)
"""The key of a block that is kept whatever it holds."""
MAX_MASS = tl.constexpr(1e30)
"""As of search_arguments."""


@triton.jit
def _score(mass, held, n_keys, at, o_c, m_c, BY_ERROR: tl.constexpr):
    """fp32 [len(o_c)], what the blocks o_c of the row at `at` are ranked by; -1 where not m_c."""
    b_s = tl.minimum(tl.load(mass + at + o_c, mask=m_c, other=0.0), MAX_MASS)
    if BY_ERROR:
        b_h = tl.minimum(tl.load(held + at + o_c, mask=m_c, other=0.0), MAX_MASS)
        b_s = tl.maximum(b_s - tl.load(n_keys + o_c, mask=m_c, other=0).to(tl.float32) * b_h, 0.0)
    return tl.where(m_c, b_s, -1.0)


@triton.jit
def _rank_blocks(
    mass,  # fp32 [B, H, Mq, Mk] contiguous, without NaN
    held,  # fp32 [B, H, Mq, Mk] contiguous, of mean keys; not read without BY_ERROR, nor is n_keys
    n_keys,  # int32 [B', Mk] contiguous
    counts,  # int32 [P, H', Mq]
    indices,  # int32 [P, H', Mq, W], last stride 1
    refresh,  # bool [1]; not read without HAS_REFRESH
    keys,  # int32 [B, H, Mq, Mk] contiguous
    H,
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
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BY_ERROR: tl.constexpr,
    HAS_REFRESH: tl.constexpr,
):
    """One program: the keys of a row."""
    if HAS_REFRESH:  # noqa: SIM102  one `if` would load without HAS_REFRESH, too
        if tl.load(refresh) == 0:
            return
    i_m = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_c, o_w = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_W)
    at = (i_bh * MQ + i_m) * MK
    p_n = n_keys + i_b * stride_nb
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_m * stride_cm)
    dense = count >= MK
    n_listed = tl.where(dense, 0, tl.minimum(tl.maximum(count, 0), W))
    p_ids = indices + i_b * stride_ib + i_h * stride_ih + i_m * stride_im

    top, best = tl.cast(-1.0, tl.float32), tl.cast(0, tl.int32)  # the earlier of equals
    for start in range(0, MK, BLOCK_C):
        b_s = _score(mass, held, p_n, at, start + o_c, start + o_c < MK, BY_ERROR)
        own = tl.max(b_s, 0)
        place = tl.min(tl.where(b_s == own, start + o_c, MK), 0)
        best = tl.where(own > top, place, best)
        top = tl.maximum(own, top)
    for start in range(0, MK, BLOCK_C):
        m_c = start + o_c < MK
        b_s = _score(mass, held, p_n, at, start + o_c, m_c, BY_ERROR)
        b_always = (start + o_c == best).to(tl.int32)
        for w in range(0, n_listed, BLOCK_W):
            b_id = tl.load(p_ids + w + o_w, mask=w + o_w < n_listed, other=0)
            b_id = tl.where(w + o_w < n_listed, tl.minimum(tl.maximum(b_id, 0), MK - 1), -1)
            b_always = tl.maximum(b_always, tl.max(((start + o_c)[:, None] == b_id[None, :]).to(tl.int32), 1))
        b_key = b_s.to(tl.int32, bitcast=True)
        b_key = tl.where((b_always > 0) | dense, ALWAYS, b_key)
        tl.store(keys + at + start + o_c, b_key, mask=m_c)


@triton.jit
def _count(p_keys, n, limit, o_c, BLOCK_C: tl.constexpr):
    """How many of n keys are at least `limit`."""
    b_found = tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, n, BLOCK_C):
        b_key = tl.load(p_keys + start + o_c, mask=start + o_c < n, other=-1)
        b_found += (b_key >= limit).to(tl.int32)
    return tl.sum(b_found, 0)


@triton.jit
def _cut_heads(
    keys,  # int32 [B, H, Mq, Mk] contiguous
    mass,  # fp32 [B, H, Mq, Mk] contiguous
    budgets,  # int32 [B, H] contiguous; not read without HAS_BUDGETS
    refresh,  # bool [1]; not read without HAS_REFRESH
    limits,  # int32 [B, H] contiguous, as of the next two: the least key that a head keeps
    places,  # int32, the last place of that key which it keeps, counted over its rows
    recall,  # fp32
    budget,  # of all heads; not read with HAS_BUDGETS
    n,  # Mq * Mk
    BLOCK_C: tl.constexpr,
    HAS_BUDGETS: tl.constexpr,
    HAS_REFRESH: tl.constexpr,
):
    """One program: what a head keeps, at most its budget unless more are always kept."""
    if HAS_REFRESH:  # noqa: SIM102  one `if` would load without HAS_REFRESH, too
        if tl.load(refresh) == 0:
            return
    i_bh = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    p_keys, p_mass = keys + i_bh * n, mass + i_bh * n
    number = tl.maximum(tl.load(budgets + i_bh) if HAS_BUDGETS else budget, _count(p_keys, n, ALWAYS, o_c, BLOCK_C))
    limit, above = tl.cast(0, tl.int32), tl.cast(0, tl.int32)  # keys above the limit
    for i in range(31):
        more = limit | (tl.cast(1, tl.int32) << (30 - i))
        found = _count(p_keys, n, more, o_c, BLOCK_C)
        limit = tl.where(found >= number, more, limit)
        above = tl.where(found >= number, above, found)
    rest = number - above

    before, last = tl.cast(0, tl.int32), tl.cast(-1, tl.int32)
    b_held = tl.zeros([BLOCK_C], tl.float32)
    b_all = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, n, BLOCK_C):
        m_c = start + o_c < n
        b_key = tl.load(p_keys + start + o_c, mask=m_c, other=-1)
        b_mass = tl.minimum(tl.load(p_mass + start + o_c, mask=m_c, other=0.0), MAX_MASS)
        b_tied = (b_key == limit).to(tl.int32)
        b_taken = (b_tied > 0) & (before + tl.cumsum(b_tied, 0) <= rest)
        before += tl.sum(b_tied, 0)
        last = tl.maximum(last, tl.max(tl.where(b_taken, start + o_c, -1), 0))
        b_held += tl.where((b_key > limit) | b_taken, b_mass, 0.0)
        b_all += b_mass
    total = tl.sum(b_all, 0)
    tl.store(limits + i_bh, limit)
    tl.store(places + i_bh, last)
    tl.store(recall + i_bh, tl.where(total > 0.0, tl.sum(b_held, 0) / tl.where(total > 0.0, total, 1.0), 1.0))


@triton.jit
def _share_budgets(
    recall,  # fp32 [B, H] contiguous
    refresh,  # bool [1]; not read without HAS_REFRESH
    budgets,  # int32 [B, H] contiguous
    threshold,
    usual,  # budget of a head
    few,  # of one with a high recall
    many,  # of one with a low recall
    H,
    BLOCK_H: tl.constexpr,
    HAS_REFRESH: tl.constexpr,
):
    """One program: the budgets of the heads of a sample."""
    if HAS_REFRESH:  # noqa: SIM102  one `if` would load without HAS_REFRESH, too
        if tl.load(refresh) == 0:
            return
    i_b = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_r = tl.load(recall + i_b * H + o_h, mask=m_h, other=-1.0)
    # [other, own]: the other one is better, or as good and lower.
    b_better = (b_r[:, None] > b_r[None, :]) | ((b_r[:, None] == b_r[None, :]) & (o_h[:, None] < o_h[None, :]))
    b_rank = tl.sum(b_better.to(tl.int32), 0)
    number = tl.minimum(tl.sum((b_r > threshold).to(tl.int32), 0), H // 2)
    b_own = tl.where(b_rank < number, few, tl.where(b_rank >= H - number, many, usual))
    tl.store(budgets + i_b * H + o_h, b_own, mask=m_h)


@triton.jit
def _list_blocks(
    keys,  # int32 [B, H, Mq, Mk] contiguous
    limits,  # int32 [B, H] contiguous, as places
    places,
    refresh,  # bool [1]; not read without HAS_REFRESH
    out_counts,  # int32 [B, H, Mq] contiguous
    out_indices,  # int32 [B, H, Mq, Mk] contiguous
    MQ,
    MK,
    BLOCK_C: tl.constexpr,
    HAS_REFRESH: tl.constexpr,
):
    """One program: the blocks that a row keeps, ascending, and zeros behind them."""
    if HAS_REFRESH:  # noqa: SIM102  one `if` would load without HAS_REFRESH, too
        if tl.load(refresh) == 0:
            return
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    at = (i_bh * MQ + i_m) * MK
    limit, last = tl.load(limits + i_bh), tl.load(places + i_bh)
    count = tl.cast(0, tl.int32)
    for start in range(0, MK, BLOCK_C):
        b_key = tl.load(keys + at + start + o_c, mask=start + o_c < MK, other=-1)
        b_keep = (b_key > limit) | ((b_key == limit) & (i_m * MK + start + o_c <= last))
        b_place = count + tl.cumsum(b_keep.to(tl.int32), 0) - 1
        tl.store(out_indices + at + b_place, start + o_c, mask=b_keep)
        count += tl.sum(b_keep.to(tl.int32), 0)
    for start in range(0, MK, BLOCK_C):
        m_c = (start + o_c >= count) & (start + o_c < MK)
        tl.store(out_indices + at + start + o_c, tl.zeros([BLOCK_C], tl.int32), mask=m_c)
    tl.store(out_counts + i_bh * MQ + i_m, count)
