"""Candidates of dynamic_threshold: the blocks that a row may read, in classes, for a choice at run time.

Each row of a static plan is put in the order [forced | near | far]:

    forced  text, the diagonal, the same place in the adjacent frames and in the sink frames
    near    blocks that touch the same frame, an adjacent one or a sink frame
    far     the others

`select_blocks` keeps the forced ones and chooses among the rest by what queries and keys say.
"""

from __future__ import annotations

import numpy as np
import torch

from ..layout import Layout
from ..plan import BlockPlan, Candidates
from ..prior import Prior
from .static_ratio import same_place, static_ratio_mask


def candidates(layout: Layout, *, sparsity: float, prior: Prior | None = None, compensate: float = 0.0) -> Candidates:
    """Candidates whose static plan skips the share `sparsity` of its blocks; P = 1, H' = 1, on the CPU.

    A row with all blocks would be dense, so rows without text have at most all but one.
    """
    prior = prior or Prior()
    n = layout.num_blocks
    text = layout.text_blocks()
    mask = static_ratio_mask(layout, sparsity=max(sparsity, int((~text).sum()) / n**2), prior=prior)
    rows = np.flatnonzero(~text)
    place, near = np.zeros((2, n, n), dtype=bool)
    place[rows] = same_place(layout, rows)
    place[rows] |= _sinks(layout, rows, prior.sink_frames)
    near[rows] = _near(layout, rows, prior.sink_frames)
    forced = mask & (place | text | np.eye(n, dtype=bool))
    forced[text] = True
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
        layout.seq_len,
        layout.seq_len,
        compensate=(compensate,),
    )
    return Candidates(plan, tensor((rank == 0).sum(1)), tensor((rank <= 1).sum(1)))


def _frames(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame that each block touches, int64 [n]; blocks beyond the video touch its nearest frame."""
    first = np.arange(layout.num_blocks) * layout.block_size - layout.text_before
    last = np.clip(first + layout.block_size - 1, 0, layout.video_tokens - 1)
    return np.clip(first, 0, layout.video_tokens - 1) // layout.tokens_per_frame, last // layout.tokens_per_frame


def _near(layout: Layout, rows: np.ndarray, sink_frames: int) -> np.ndarray:
    """bool [R, n]: blocks that touch a frame within one of a row's frames, or a sink frame."""
    first, last = _frames(layout)
    near = (first[None] <= last[rows, None] + 1) & (last[None] >= first[rows, None] - 1)
    result: np.ndarray = near | (first < sink_frames)
    return result


def _sinks(layout: Layout, rows: np.ndarray, sink_frames: int) -> np.ndarray:
    """bool [R, n]: the block that holds a row's middle place in each sink frame."""
    found = np.zeros((len(rows), layout.num_blocks), dtype=bool)
    first = rows * layout.block_size - layout.text_before
    middle = first + np.minimum(layout.block_size, layout.video_tokens - first) // 2
    for frame in range(min(sink_frames, layout.frames)):
        token = middle % layout.tokens_per_frame + frame * layout.tokens_per_frame
        found[np.arange(len(rows)), (token + layout.text_before) // layout.block_size] = True
    return found
