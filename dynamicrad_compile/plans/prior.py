"""The radial prior: how much attention two blocks are expected to share, from the distance of their tokens alone.

    mass(dt, ds) = (1 + dt)^-temporal_decay * (core^2 + (ds / width)^2)^(-3/2)

dt is the distance in latent frames, ds the Euclidean distance inside the frame in tokens, core a small radius in
proportion to decay_factor, and width a factor of the band that dt belongs to: 1 in the same frame, adjacent_width at
distance 1, far_width beyond. With the defaults, summed over an image row this falls like ((1 + dt) * dy)^-2, so lines
of equal mass are those of Radial Attention: the spatial reach halves when 1 + dt doubles. A larger decay_factor spends
a budget on wide neighbourhoods, a smaller one on the same place in many frames. A sink frame counts as adjacent to
every frame. Thinning is the papers' frequency reduction: a far pair of frames counts only at every s-th distance.

The mass of a block is exact over its key tokens, wherever it starts: one running sum over a frame gives the mass of
any run of tokens. Its query tokens are represented by a few of them.
"""

from __future__ import annotations

import math

import numpy as np

from ..profiles.parameters import Prior
from .layout import Layout, Segments

# Query tokens that stand for a block.
REPRESENTATIVES = 4
# Radius below which spatial distance does not count, in units of sqrt(height * width). At decay_factor 1 the
# plans share 74 to 83 % of the union with Radial Attention's of equal sparsity (four full-size grids).
CORE = 0.02
# ... and at least this many tokens, or one token would outweigh all others.
MIN_CORE = 0.5


def mass_by_distance(prior: Prior, frames: int) -> np.ndarray:
    """float64 [frames]: factor of the mass by frame distance."""
    distance = np.arange(frames, dtype=np.float64)
    if prior.temporal_decay == 2.0:
        weight = 1.0 / np.square(1.0 + distance)  # exact on every machine, unlike a power
    else:
        weight = np.power(1.0 + distance, -prior.temporal_decay)
    step = np.maximum(1, np.floor(distance * prior.thinning / frames))
    weight[(distance >= 2) & (distance % step != 0)] = 0.0
    result: np.ndarray = weight
    return result


class _Band:
    """Running sums of the spatial mass over a frame, for one width.

    The mass that a token at (y, x) has in common with the first k tokens of a frame, k = r * width + c, is
    that of r whole rows and of c tokens in the next one. Both are differences of running sums over offsets.
    """

    def __init__(self, height: int, width: int, core: float, stretch: float) -> None:
        self.height, self.width = height, width
        dy = np.arange(1 - height, height, dtype=np.float64)[:, None] / stretch
        dx = np.arange(1 - width, width, dtype=np.float64)[None, :] / stretch
        square = core * core + dy * dy + dx * dx
        # in_row[i, j]: mass of the offsets (dy[i], dx[0 .. j - 1]); one spare row for k = height * width.
        self.in_row = np.zeros((2 * height, 2 * width))
        np.cumsum(1.0 / (square * np.sqrt(square)), axis=1, out=self.in_row[:-1, 1:])
        # rows[i, x]: mass of the whole rows dy[0 .. i - 1] around column x.
        whole = self.in_row[:-1, width:] - self.in_row[:-1, :width]
        self.rows = np.zeros((2 * height, width))
        np.cumsum(whole[:, ::-1], axis=0, out=self.rows[1:])

    def before(self, place: np.ndarray, cut_row: np.ndarray, cut_column: np.ndarray) -> np.ndarray:
        """float64 [R, C]: mass between the tokens `place` of a frame and all tokens before each cut of it."""
        y, x = np.divmod(place[:, None], self.width)
        first, row = self.height - 1 - y, self.height - 1 - y + cut_row
        left = self.width - 1 - x
        return self.rows[row, x] - self.rows[first, x] + self.in_row[row, left + cut_column] - self.in_row[row, left]


class Scorer:
    """The prior's mass between the blocks of a layout."""

    def __init__(self, layout: Layout, prior: Prior) -> None:
        frames, height, width = layout.grid
        self.layout = layout
        self.segments: Segments = layout.segments()
        self.blocks, self.first_segment = np.unique(self.segments.block, return_index=True)
        # A key in a sink frame is at most one frame away.
        self.reach = np.where(self.segments.frame < prior.sink_frames, 1, frames)
        self.temporal = mass_by_distance(prior, frames)
        core = max(MIN_CORE, CORE * prior.decay_factor * math.sqrt(height * width))
        widths = (1.0, prior.adjacent_width, prior.far_width)
        self.bands = [_Band(height, width, core, stretch) for stretch in dict.fromkeys(widths)]
        self.band_of = np.array([list(dict.fromkeys(widths)).index(stretch) for stretch in widths])
        # Every segment is the tokens between two of these cuts of its frame.
        self.cuts, place = np.unique(np.append(self.segments.start, self.segments.stop), return_inverse=True)
        self.cut_row, self.cut_column = np.divmod(self.cuts, width)
        self.start, self.stop = place.reshape(2, -1)

    def _mass(self, place: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """float64 [R, S]: spatial mass between tokens `place` [R] and all segments at frame distances [R, S]."""
        before = [band.before(place, self.cut_row, self.cut_column) for band in self.bands]
        if len(before) == 1:
            return before[0].take(self.stop, axis=1) - before[0].take(self.start, axis=1)
        offset = self.band_of[np.minimum(distance, 2)] * len(self.cuts)
        joined = np.concatenate(before, axis=1)
        stop = np.take_along_axis(joined, offset + self.stop, axis=1)
        return stop - np.take_along_axis(joined, offset + self.start, axis=1)

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """float32 [R, n]: mass between the query blocks `rows` (without text) and all blocks."""
        layout, seg = self.layout, self.segments
        first, length = layout.row_tokens(rows)
        total = np.zeros((len(rows), len(seg.block)))
        for odd in range(1, 2 * REPRESENTATIVES, 2):
            token = first + length * odd // (2 * REPRESENTATIVES)
            frame, place = np.divmod(token, layout.tokens_per_frame)
            distance = np.minimum(np.abs(frame[:, None] - seg.frame), self.reach)
            mass = self._mass(place, distance)
            mass *= self.temporal.take(distance)
            total += mass
        scores = np.zeros((len(rows), layout.num_blocks), dtype=np.float32)
        scores[:, self.blocks[0] : self.blocks[-1] + 1] = np.add.reduceat(total, self.first_segment, axis=1)
        return scores
