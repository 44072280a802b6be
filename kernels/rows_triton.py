"""What kernels share: which row is a program's, what they load of a plan and of a tensor, biases of mean keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place_of_item(pid, items, n_heavy, n_rows, TILES: tl.constexpr):
    """(sample and head, tile of queries) of one of `items`; a row of the plan has TILES tiles, an item each.

    The first n_heavy rows of all heads come first, then the others head by head. Tiles are those of the rows as
    `heavy_first` lists them. No pointer comes in: for compilers all that goes into an address that is written to would
    be written to.
    """
    BH = items // (n_rows * TILES)
    n_heavy = n_heavy * TILES
    n_light = n_rows * TILES - n_heavy
    is_heavy = pid < n_heavy * BH
    light = pid - n_heavy * BH
    i_bh = tl.where(is_heavy, pid % BH, light // tl.maximum(n_light, 1)).to(tl.int64)
    i_m = tl.where(is_heavy, pid // BH, n_heavy + light % tl.maximum(n_light, 1))
    return i_bh, i_m


@triton.jit
def _row_of_plan(p_count, n_blocks, W):
    """(blocks that a row reads, ids that it lists): a dense row reads all and lists none. In range whatever p_count."""
    count = tl.load(p_count)
    dense = count >= n_blocks
    count = tl.minimum(tl.maximum(count, 0), W)
    return tl.where(dense, n_blocks, count), tl.where(dense, 0, count)


@triton.jit
def _block_at(p_ids, place, n_listed, n_blocks):
    """Id of the block at `place` of a row, in range whatever its ids are; a place that it does not list is its id."""
    i_kv = tl.load(p_ids + place, mask=place < n_listed, other=place)
    return tl.minimum(tl.maximum(i_kv, 0), n_blocks - 1)


@triton.jit
def _load_rows(p, o_row, stride, o_d, length, D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED, WIDEN: tl.constexpr):
    """[rows, BLOCK_D] from rows o_row of x [length, D]; zeros beyond length (only if RAGGED) and beyond D."""
    p_x = p + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if RAGGED and D < BLOCK_D:
        b_x = tl.load(p_x, mask=(o_row < length)[:, None] & (o_d < D)[None, :], other=0.0)
    elif RAGGED:
        b_x = tl.load(p_x, mask=(o_row < length)[:, None], other=0.0)
    elif D < BLOCK_D:
        b_x = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p_x)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def _rows_at(places, o, length):
    """The rows of places o; any row beyond length."""
    return tl.load(places + o, mask=o < length, other=0)


@triton.jit
def _rows(
    x,
    i_b,
    i_h,
    p_x,
    first,
    stride,
    length,
    o_n,
    r_n,
    o_d,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D], rows from `first` on of one head of x; zeros beyond length (TMA, or RAGGED) and beyond D.

    With GATHER places from `first` on, whose rows are r_n.
    """
    if TMA:
        b_x = x.load([i_b, i_h, first, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        if GATHER:
            p_rows = p_x + r_n.to(tl.int64)[:, None] * stride + o_d[None, :]
        else:
            p_rows = p_x + first.to(tl.int64) * stride + (o_n[:, None] * stride + o_d[None, :])
        if RAGGED and D < BLOCK_D:
            b_x = tl.load(p_rows, mask=(first + o_n < length)[:, None] & (o_d < D)[None, :], other=0.0)
        elif RAGGED:
            b_x = tl.load(p_rows, mask=(first + o_n < length)[:, None], other=0.0)
        elif D < BLOCK_D:
            b_x = tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
        else:
            b_x = tl.load(p_rows)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def _mean_bias(n_valid, weight, kept, o_j, n_blocks):
    """fp32 [len(o_j)], log2(keys * weight) of the mean keys o_j; -inf where the row keeps the block."""
    m_j = o_j < n_blocks
    b_n = tl.load(n_valid + o_j, mask=m_j, other=0)
    b_bits = tl.load(kept + o_j // 32, mask=m_j, other=-1)
    m_j = (((b_bits >> (o_j % 32)) & 1) == 0) & (b_n > 0)
    return tl.where(m_j, tl.log2(b_n.to(tl.float32) * weight), float("-inf"))
