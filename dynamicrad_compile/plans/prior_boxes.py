"""The radial prior between blocks that are boxes of the video: by the distance of their centres, whatever the order.

    mass(I, J) = n_J (1 + dt)^-temporal_decay * (core^2 + (ds / width)^2)^(-3/2)

with the parameters of `plans.prior`, n_J the tokens of J, dt the distance of the centres in frames and ds the one
inside the frame. A block that holds tokens of a sink frame is at most one frame away. Frequency reduction
(`thinning`), which drops whole distances of frames, is not for blocks that span several: it is ignored.
"""

from __future__ import annotations

import math

import numpy as np

from ..profiles.parameters import Prior
from .layout import Layout
from .prior import CORE, MIN_CORE


class BoxScorer:
    """The prior's mass between the blocks of a layout, with `scores` as `prior.Scorer` has it."""

    def __init__(self, layout: Layout, prior: Prior) -> None:
        _, height, width = layout.grid
        self.layout, self.prior, self.places = layout, prior, layout.block_places()
        self.asking = self.places if layout.queries is None else layout.row_places()
        self.core = max(MIN_CORE, CORE * prior.decay_factor * math.sqrt(height * width))
        self.sink = self.places.first < prior.sink_frames

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """float32 [R, n]: mass between the query blocks `rows` (without text) and all blocks."""
        asking, centre = self.asking.centre[np.searchsorted(self.asking.block, rows)], self.places.centre
        dt, dy, dx = (np.abs(asking[:, d, None] - centre[None, :, d]) for d in range(3))
        dt = np.where(self.sink, np.minimum(dt, 1.0), dt)
        stretch = np.where(dt < 0.5, 1.0, np.where(dt < 1.5, self.prior.adjacent_width, self.prior.far_width))
        square = self.core**2 + (dy * dy + dx * dx) / (stretch * stretch)
        mass = self.places.count * np.power(1.0 + dt, -self.prior.temporal_decay) / (square * np.sqrt(square))
        scores = np.zeros((len(rows), self.layout.num_blocks), dtype=np.float32)
        scores[:, self.places.block] = mass
        return scores
