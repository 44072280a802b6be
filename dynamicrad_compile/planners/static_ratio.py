"""A static plan with a real budget: each row keeps its best blocks by a radial prior.

The prior says how much attention two tokens are expected to share, from their distance alone:

    mass = (1 + dt)^-2 * (core^2 + ds^2)^(-3/2)

with dt the distance in latent frames, ds the Euclidean distance inside the frame in tokens, and core a small
radius in proportion to decay_factor. Summed over an image row this falls like ((1 + dt) * dy)^-2, so lines of
equal mass are those of Radial Attention: the spatial reach halves when 1 + dt doubles. A larger decay_factor
spends the budget on wider neighbourhoods in near frames, a smaller one on the same place in far frames. A
sink frame counts as adjacent to every frame.

The mass of a block is exact over its key tokens, wherever it starts: one running sum over a frame gives the
mass of any run of tokens. Its query tokens are represented by a few of them.
"""

from __future__ import annotations

import math

import numpy as np

from ._layout import Layout, Segments

# Query tokens that stand for a block.
REPRESENTATIVES = 4
# Radius below which spatial distance does not count, in units of sqrt(height * width). At decay_factor 1 the
# plans share 74 to 83 % of the union with Radial Attention's of equal sparsity (four full-size grids).
CORE = 0.02
# ... and at least this many tokens, or one token would outweigh all others.
MIN_CORE = 0.5
# Elements of one temporary array; chunks of rows keep temporaries in the processor's cache.
CHUNK_ELEMENTS = 1 << 15
# Low mantissa bits of a float32 score that are rounding noise and must not break ties.
NOISE_BITS = 8


def row_budgets(layout: Layout, sparsity: float) -> np.ndarray:
    """int64 [V]: blocks that each row without text keeps, so that the plan skips the share `sparsity` in all.

    Text rows are paid for first. The rest is spread evenly, so rows differ by at most one block. A row never
    gets fewer than its forced blocks (text columns and the diagonal) nor more than there are.
    """
    n = layout.num_blocks
    text = int(layout.text_blocks().sum())
    rows = n - text
    if rows == 0:
        return np.zeros(0, dtype=np.int64)
    total = round((1.0 - sparsity) * n * n)
    budget = min(max(total - text * n, rows * (text + 1)), rows * n)
    return np.diff(np.arange(rows + 1, dtype=np.int64) * budget // rows)


def static_ratio_mask(
    layout: Layout, *, sparsity: float, decay_factor: float = 1.0, sink_frames: int = 1
) -> np.ndarray:
    """Block mask that skips the share `sparsity` of its blocks, bool [n, n] with n = layout.num_blocks.

    Text rows, text columns and the diagonal are always kept; if they alone exceed the budget, exactly they
    are kept and the plan is less sparse than asked. Deterministic: ties go to the nearer block, then to the
    earlier one, and scores use only operations that IEEE 754 defines exactly.
    Time O(n^2) in numpy; memory one byte per block pair plus O(T + n) for T tokens per frame.
    """
    n = layout.num_blocks
    text = layout.text_blocks()
    video_rows = np.flatnonzero(~text)
    budgets = row_budgets(layout, sparsity)
    scorer = _Scorer(layout, decay_factor, sink_frames)
    mask = np.zeros((n, n), dtype=bool)
    mask[text] = True
    rows_per_chunk = max(1, CHUNK_ELEMENTS // (n + layout.frames))
    for low in range(0, len(video_rows), rows_per_chunk):
        rows = video_rows[low : low + rows_per_chunk]
        keys = _sort_keys(scorer.scores(rows), rows)
        # Forced blocks come before all others; adding keeps the keys of a row different from each other.
        keys[:, text] += 1 << 62
        keys[np.arange(len(rows)), rows] += 1 << 62
        position = n - budgets[low : low + rows_per_chunk]
        ordered = np.partition(keys, np.unique(position), axis=1)
        mask[rows] = keys >= np.take_along_axis(ordered, position[:, None], axis=1)
    return mask


class _Scorer:
    """The prior's mass between blocks.

    The mass that a token at (y, x) has in common with the first k tokens of a frame, k = r * width + c, is
    that of r whole rows and of c tokens in the next one. Both are differences of running sums over offsets.
    """

    def __init__(self, layout: Layout, decay_factor: float, sink_frames: int) -> None:
        frames, height, width = layout.grid
        self.layout = layout
        self.segments: Segments = layout.segments()
        self.blocks, self.first_segment = np.unique(self.segments.block, return_index=True)
        # A key in a sink frame is at most one frame away.
        self.reach = np.where(self.segments.frame < sink_frames, 1, frames)
        self.temporal = 1.0 / np.square(1.0 + np.arange(frames))
        core = max(MIN_CORE, CORE * decay_factor * math.sqrt(height * width))
        dy = np.arange(1 - height, height, dtype=np.float64)[:, None]
        dx = np.arange(1 - width, width, dtype=np.float64)[None, :]
        square = core * core + dy * dy + dx * dx
        # in_row[i, j]: mass of the offsets (dy[i], dx[0 .. j - 1]); one spare row for k = height * width.
        self.in_row = np.zeros((2 * height, 2 * width))
        np.cumsum(1.0 / (square * np.sqrt(square)), axis=1, out=self.in_row[:-1, 1:])
        # rows[i, x]: mass of the whole rows dy[0 .. i - 1] around column x.
        whole = self.in_row[:-1, width:] - self.in_row[:-1, :width]
        self.rows = np.zeros((2 * height, width))
        np.cumsum(whole[:, ::-1], axis=0, out=self.rows[1:])
        # Every segment is the tokens between two of these cuts of its frame.
        cuts, place = np.unique(np.append(self.segments.start, self.segments.stop), return_inverse=True)
        self.cut_row, self.cut_column = np.divmod(cuts, width)
        self.start, self.stop = place.reshape(2, -1)

    def _mass_before_cuts(self, place: np.ndarray) -> np.ndarray:
        """float64 [R, C]: mass between the tokens `place` of a frame and all tokens before each cut of it."""
        _, height, width = self.layout.grid
        y, x = np.divmod(place[:, None], width)
        first, row = height - 1 - y, height - 1 - y + self.cut_row
        left = width - 1 - x
        return (
            self.rows[row, x] - self.rows[first, x] + self.in_row[row, left + self.cut_column] - self.in_row[row, left]
        )

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """float32 [R, n]: mass between the query blocks `rows` (without text) and all blocks."""
        layout, seg = self.layout, self.segments
        first = rows * layout.block_size - layout.text_before
        length = np.minimum(layout.block_size, layout.video_tokens - first)
        total = np.zeros((len(rows), len(seg.block)))
        for odd in range(1, 2 * REPRESENTATIVES, 2):
            token = first + length * odd // (2 * REPRESENTATIVES)
            frame, place = np.divmod(token, layout.tokens_per_frame)
            before = self._mass_before_cuts(place)
            mass = before.take(self.stop, axis=1)
            mass -= before.take(self.start, axis=1)
            mass *= self.temporal.take(np.minimum(np.abs(frame[:, None] - seg.frame), self.reach))
            total += mass
        scores = np.zeros((len(rows), layout.num_blocks), dtype=np.float32)
        scores[:, self.blocks[0] : self.blocks[-1] + 1] = np.add.reduceat(total, self.first_segment, axis=1)
        return scores


def _sort_keys(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64 [R, n]: larger is better, all different within a row.

    The high bits are the score (the bits of a positive float32 order like the number), the low ones the
    tie-break: the nearer block first, of two equally near ones the earlier.
    """
    n = scores.shape[1]
    offset = np.arange(n, dtype=np.int64)[None, :] - rows[:, None]
    tie_break = 2 * (n - np.abs(offset)) + (offset < 0)
    return (scores.view(np.int32).astype(np.int64) >> NOISE_BITS << 32) + tie_break
