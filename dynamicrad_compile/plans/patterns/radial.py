"""Pattern "radial": Radial Attention's static mask, computed from intervals instead of token masks.

Source: Li et al., "Radial Attention" (2025), and its code (mit-han-lab/radial-attention, attn_mask.py). With
T tokens in a frame, P the power of two above T, d the distance of two frames and g = d.bit_length():

    window      token a of frame i reads token b of frame j iff |a - b| <= w; w = T for d <= 1,
                else w = max(P / 2^g * decay_factor, block_size)
    thinning    if l = P / 2^g < 128, a pair of frames is kept only if d is a multiple of floor(128 / l); with
                another `thinning_tokens` than 128, of that number instead (DynamicRad's code takes the block size)
    sink        every token reads all tokens of the first `sink_frames` frames (published: 1 for Wan, else 0)
    shrinking   a tile of tokens is kept iff more than 60 % of its key columns that are read at all
                are read by more than a third of the tile's query rows

Where a block straddles frames or the sequence ends inside a block, the published code drops blocks, cuts off
the tail, or crashes. Here tiles are `Segments` (one frame and one block), the share of rows is taken over the
rows that the segment has, and a block is kept if any of its segment pairs is. The diagonal and text blocks
are always kept. If T is a multiple of the block size the masks are the published ones.
"""

from __future__ import annotations

import numpy as np

from ...profiles.parameters import Radial
from ..layout import Layout, Segments
from ..plan import BlockPlan
from .pattern import Pattern, plan_of_mask

# Elements of one temporary array; chunks of rows keep temporaries in the processor's cache.
CHUNK_ELEMENTS = 1 << 15


def frame_distance_tables(layout: Layout, parameters: Radial) -> tuple[np.ndarray, np.ndarray]:
    """Window (int32 [F], in tokens) and whether the pair of frames is kept (bool [F]), by frame distance."""
    tokens = layout.tokens_per_frame
    power = 1 << tokens.bit_length()
    distance = np.arange(layout.frames, dtype=np.int64)
    octave = np.frexp(distance)[1].astype(np.int64)  # d.bit_length()
    # The published code compares integer distances with a float32 window.
    width = np.float32(np.maximum(power / 2.0**octave * parameters.decay_factor, layout.block_size))
    window = np.where(distance <= 1, tokens, np.floor(np.minimum(width, tokens)))
    step = np.maximum(1, (parameters.thinning_tokens << octave) // power)
    return window.astype(np.int32), distance % step == 0


def radial_mask(layout: Layout, parameters: Radial | None = None) -> np.ndarray:
    """Block mask of Radial Attention, bool [m, n] with m = layout.num_rows and n = layout.num_blocks.

    Time O(S^2) for S segments in numpy; memory one byte per block pair plus a constant.
    """
    parameters = parameters or Radial()
    window, kept_distance = frame_distance_tables(layout, parameters)
    asking, seg = layout.row_segments(), layout.segments()
    mask = np.zeros((layout.num_rows, layout.num_blocks), dtype=bool)
    blocks, first_segment = np.unique(seg.block, return_index=True)
    rows, first_row = np.unique(asking.block, return_index=True)
    last_row = np.append(first_row[1:], len(asking.block))
    rows_per_chunk = max(1, CHUNK_ELEMENTS // len(seg.block))
    low = 0
    while low < len(rows):
        # As many whole blocks as fit the chunk, at least one.
        budget = first_row[low] + rows_per_chunk
        high = max(low + 1, int(np.searchsorted(last_row, budget, side="right")))
        some = Segments(*(x[first_row[low] : last_row[high - 1]] for x in vars(asking).values()))
        kept = _kept_segment_pairs(some, seg, window, kept_distance, layout.tokens_per_frame, parameters.sink_frames)
        kept = np.logical_or.reduceat(kept, first_row[low:high] - first_row[low], axis=0)
        mask[rows[0] + low : rows[0] + high, blocks[0] : blocks[-1] + 1] = np.logical_or.reduceat(
            kept, first_segment, axis=1
        )
        low = high
    mask[np.arange(len(mask)), layout.own_blocks()] = True
    mask[layout.text_rows()] = True
    mask[:, layout.text_blocks()] = True
    return mask


def _kept_segment_pairs(
    asking: Segments, seg: Segments, window: np.ndarray, kept_distance: np.ndarray, tokens: int, sink_frames: int
) -> np.ndarray:
    """bool [R, S]: the shrinking rule for R segments of queries against all segments of keys.

    Key column b is read by min(L, 2w + 1, b + w - a0 + 1, a1 - b + w) of the L rows [a0, a1). So the columns
    read by at least m rows are an interval, [a0 + m - 1 - w, a1 - m + w]: counting them needs no token mask.
    (2w + 1 >= L holds always, since w is at least the block size or the frame.)
    """
    a0, a1 = asking.start[:, None], asking.stop[:, None]
    b0, b_last = seg.start[None, :], seg.stop[None, :] - 1
    distance = np.abs(asking.frame[:, None] - seg.frame[None, :])
    w = window[distance]
    kept = kept_distance[distance]
    sink = seg.frame < sink_frames
    w[:, sink] = tokens
    kept[:, sink] = True

    def columns_read_by(m: np.ndarray | int) -> np.ndarray:
        last = np.minimum(b_last, (a1 - m) + w)
        first = np.maximum(b0, (a0 + m - 1) - w)
        return np.maximum(last - first + 1, 0)

    nonzero = columns_read_by(1)
    dense = columns_read_by((a1 - a0) // 3 + 1)
    kept &= 5 * dense > 3 * nonzero
    return kept


def radial_plan(layout: Layout, parameters: Radial) -> BlockPlan:
    """The plan of Radial Attention's mask."""
    return plan_of_mask(radial_mask(layout, parameters), layout)


RADIAL = Pattern("radial", Radial, radial_plan)
