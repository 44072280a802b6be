"""Pattern "dynamicrad": each row keeps its best blocks by the radial prior (`plans.prior`), within a real budget.

Mode static_ratio reads them as they are. Mode dynamic_threshold chooses among them when the graph runs; for that each
row is put in the order [forced | near | far]:

    forced  text, the row's own block, the same place in the adjacent frames and in the sink frames
    near    blocks that touch the same frame, an adjacent one or a sink frame
    far     the others

Where blocks are boxes of the video, only text and the own block are forced and all others are near: a box touches many
frames, and what queries and keys say is worth more than where it lies.

`select_blocks` keeps the forced ones and chooses among the rest by what queries and keys say.
"""

from __future__ import annotations

import numpy as np
import torch

from ...profiles.parameters import Prior, StaticRatio
from .. import cost
from ..layout import Layout
from ..plan import BlockPlan, Candidates
from ..prior import Scorer
from ..prior_boxes import BoxScorer
from .pattern import Pattern, orders_of, plan_of_mask

# Elements of one temporary array; chunks of rows keep temporaries in the processor's cache.
CHUNK_ELEMENTS = 1 << 15
# Low mantissa bits of a float32 score that are rounding noise and must not break ties.
NOISE_BITS = 8


def row_budgets(layout: Layout, sparsity: float) -> np.ndarray:
    """int64 [V]: blocks that each row without text keeps, so that the plan skips the share `sparsity` in all.

    Text rows are paid for first. The rest is spread evenly, so rows differ by at most one block. A row never
    gets fewer than its forced blocks (text columns and its own) nor more than there are.
    """
    m, n = layout.num_rows, layout.num_blocks
    text_rows, text_blocks = int(layout.text_rows().sum()), int(layout.text_blocks().sum())
    rows = m - text_rows
    if rows == 0:
        return np.zeros(0, dtype=np.int64)
    total = round((1.0 - sparsity) * m * n)
    budget = min(max(total - text_rows * n, rows * (text_blocks + 1)), rows * n)
    return np.diff(np.arange(rows + 1, dtype=np.int64) * budget // rows)


def static_ratio_mask(layout: Layout, *, sparsity: float, prior: Prior | None = None) -> np.ndarray:
    """Block mask that skips the share `sparsity` of its blocks, bool [m, n]: layout.num_rows x layout.num_blocks.

    Text rows, text columns and each row's own block are always kept; if they alone exceed the budget, exactly they
    are kept and the plan is less sparse than asked. The same place in the adjacent frames comes next, so no prior
    can delete adjacent frames. Deterministic: ties go to the nearer block, then to the earlier one, and with the
    default temporal decay scores use only operations that IEEE 754 defines exactly.
    Time O(n^2) in numpy; memory one byte per block pair plus O(T + n) for T tokens per frame.
    """
    n = layout.num_blocks
    text_rows, text, own = layout.text_rows(), layout.text_blocks(), layout.own_blocks()
    video_rows = np.flatnonzero(~text_rows)
    budgets = row_budgets(layout, sparsity)
    scorer = (Scorer if layout.box is None else BoxScorer)(layout, prior or Prior())
    mask = np.zeros((layout.num_rows, n), dtype=bool)
    mask[text_rows] = True
    rows_per_chunk = max(1, CHUNK_ELEMENTS // (n + layout.frames))
    for low in range(0, len(video_rows), rows_per_chunk):
        rows = video_rows[low : low + rows_per_chunk]
        keys = _sort_keys(scorer.scores(rows), own[rows])
        # Forced blocks come before all others; adding keeps the keys of a row different from each other.
        keys[same_place(layout, rows)] |= 1 << 61
        keys[:, text] += 1 << 62
        keys[np.arange(len(rows)), own[rows]] |= 1 << 62
        position = n - budgets[low : low + rows_per_chunk]
        ordered = np.partition(keys, np.unique(position), axis=1)
        mask[rows] = keys >= np.take_along_axis(ordered, position[:, None], axis=1)
    return mask


def same_place(layout: Layout, rows: np.ndarray) -> np.ndarray:
    """bool [R, n]: the block that holds the middle token of a row, and the same place in both adjacent frames.

    Of boxes: those in front of the row's first frame and behind its last one.
    """
    if layout.box is not None:
        return _same_box(layout, rows)
    place = np.zeros((len(rows), layout.num_blocks), dtype=bool)
    first, length = layout.row_tokens(rows)
    middle = first + length // 2
    for shift in (-layout.tokens_per_frame, 0, layout.tokens_per_frame):
        token = middle + shift
        inside = (token >= 0) & (token < layout.video_tokens)
        place[np.flatnonzero(inside), (token[inside] + layout.text_before) // layout.block_size] = True
    return place


def _same_box(layout: Layout, rows: np.ndarray) -> np.ndarray:
    """`same_place` of boxes, at the place in the frame of each row's centre."""
    place = np.zeros((len(rows), layout.num_blocks), dtype=bool)
    places, order = layout.row_places(), layout.order()
    assert order is not None
    position = np.argsort(order)
    at = np.searchsorted(places.block, rows)
    _, y, x = np.rint(places.centre[at]).astype(np.int64).T
    for frame in (places.first[at] - 1, places.last[at] + 1):
        inside = np.flatnonzero((frame >= 0) & (frame < layout.frames))
        token = np.ravel_multi_index((frame[inside], y[inside], x[inside]), layout.grid)
        place[inside, position[token + layout.text_before] // layout.block_size] = True
    return place


def _sort_keys(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """int64 [R, n]: larger is better, all different within a row; own [R]: each row's own block.

    The high bits are the score (the bits of a positive float32 order like the number), the low ones the
    tie-break: the nearer block first, of two equally near ones the earlier.
    """
    n = scores.shape[1]
    offset = np.arange(n, dtype=np.int64)[None, :] - own[:, None]
    tie_break = 2 * (n - np.abs(offset)) + (offset < 0)
    return (scores.view(np.int32).astype(np.int64) >> NOISE_BITS << 32) + tie_break


def static_ratio_plan(layout: Layout, parameters: StaticRatio) -> BlockPlan:
    """The static plan; the blocks pay for what compensation costs."""
    sparsity = cost.blocks_to_skip(parameters.sparsity, layout.block_size, parameters.compensate)
    mask = static_ratio_mask(layout, sparsity=sparsity, prior=parameters)
    return plan_of_mask(mask, layout, parameters.compensate, parameters.covariance)


def candidates(layout: Layout, parameters: StaticRatio) -> Candidates:
    """Candidates of a choice at run time: the blocks of the static plan, P = 1, H' = 1, on the CPU.

    A row with all blocks would be dense, so rows without text have at most all but one.
    """
    sparsity = cost.blocks_to_skip(parameters.sparsity, layout.block_size, parameters.compensate)
    m, n = layout.num_rows, layout.num_blocks
    text_rows = layout.text_rows()
    rows = np.flatnonzero(~text_rows)
    mask = static_ratio_mask(layout, sparsity=max(sparsity, len(rows) / (m * n)), prior=parameters)
    place, near = np.zeros((2, m, n), dtype=bool)
    if layout.box is None:
        place[rows] = same_place(layout, rows)
        place[rows] |= _sinks(layout, rows, parameters.sink_frames)
        near[rows] = _near(layout, rows, parameters.sink_frames)
    else:
        near[rows] = True
    place[np.arange(m), layout.own_blocks()] = True
    forced = mask & (place | layout.text_blocks())
    forced[text_rows] = True
    rank = np.where(forced, 0, np.where(near, 1, 2)).astype(np.int8)
    rank[~mask] = 3
    counts = mask.sum(1)
    order = np.argsort(rank, axis=1, kind="stable")[:, : max(1, counts.max())]
    order[np.arange(order.shape[1]) >= counts[:, None]] = 0

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32))[None, None]

    plan = BlockPlan(
        tensor(counts),
        tensor(order),
        layout.block_size,
        layout.block_size,
        layout.q_len,
        layout.seq_len,
        compensate=(parameters.compensate,),
        covariance=parameters.covariance,
        **orders_of(layout),
        check_values=False,
    )
    return Candidates(plan, tensor((rank == 0).sum(1)), tensor((rank <= 1).sum(1)), check_values=False)


def _frames(layout: Layout, first: np.ndarray, length: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame that runs of tokens touch, int64 each; those beyond the video touch its nearest frame.

    first: where they begin, counted from the first video token.
    """
    inside = (np.clip(token, 0, layout.video_tokens - 1) for token in (first, first + length - 1))
    begin, end = (token // layout.tokens_per_frame for token in inside)
    return begin, end


def _near(layout: Layout, rows: np.ndarray, sink_frames: int) -> np.ndarray:
    """bool [R, n]: blocks that touch a frame within one of a row's frames, or a sink frame."""
    blocks = np.arange(layout.num_blocks, dtype=np.int64) * layout.block_size - layout.text_before
    first, last = _frames(layout, blocks, layout.block_size)
    begin, end = _frames(layout, *layout.row_tokens(rows))
    near = (first[None] <= end[:, None] + 1) & (last[None] >= begin[:, None] - 1)
    result: np.ndarray = near | (first < sink_frames)
    return result


def _sinks(layout: Layout, rows: np.ndarray, sink_frames: int) -> np.ndarray:
    """bool [R, n]: the block that holds a row's middle place in each sink frame."""
    found = np.zeros((len(rows), layout.num_blocks), dtype=bool)
    first, length = layout.row_tokens(rows)
    middle = first + length // 2
    for frame in range(min(sink_frames, layout.frames)):
        token = middle % layout.tokens_per_frame + frame * layout.tokens_per_frame
        found[np.arange(len(rows)), (token + layout.text_before) // layout.block_size] = True
    return found


DYNAMICRAD = Pattern("dynamicrad", StaticRatio, static_ratio_plan, candidates, needs="selection")
