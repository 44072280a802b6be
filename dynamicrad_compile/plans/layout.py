"""Where frames, text and blocks lie in a token sequence.

The sequence is [text_before | frames x height x width video tokens | text_after], cut into blocks of
`block_size` tokens from position 0. The last block may be partial. With a box the video is in the
order of `plans.order`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PlanError
from ..kernels.blocks import cdiv
from .order import Box, video_order

MAX_BLOCKS = 10_000
"""Blocks of a sequence that a pattern is made for: it looks at every pair of them, in 3 to 6 s for so many."""

MIN_FRAMES = 3
"""Two frames are a pair of images: there is no motion for a plan to follow."""


def too_long(tokens: int, block_size: int) -> str:
    """Why no pattern is made for a sequence of so many tokens; "" if it is."""
    blocks = cdiv(tokens, block_size)
    if blocks <= MAX_BLOCKS:
        return ""
    return (
        f"{tokens} tokens are {blocks} blocks of {block_size}, more than the {MAX_BLOCKS} that a plan may have. "
        "Take larger blocks (block_size, up to 256) or a shorter or smaller video."
    )


@dataclass(frozen=True)
class Segments:
    """Maximal runs of video tokens that lie in one frame and in one block, in sequence order.

    All arrays are int32 [S]; S is at most the number of video blocks plus the number of frames.

    frame   frame of the run
    start   first token, counted from the start of its frame
    stop    one past the last token, counted from the start of its frame
    block   block of the run
    """

    frame: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    block: np.ndarray


@dataclass(frozen=True)
class BlockPlaces:
    """Places of the blocks that hold video tokens; arrays of V blocks, in sequence order.

    block         int64 [V], its number
    count         int64 [V], video tokens in it
    centre        float64 [V, 3], mean (frame, row, column) of them
    first, last   int64 [V], its first and its last frame
    """

    block: np.ndarray
    count: np.ndarray
    centre: np.ndarray
    first: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class Layout:
    """A token grid in a sequence with text. Lengths are in tokens. Raises PlanError for more than MAX_BLOCKS blocks.

    box  (frames, height, width) of a block, whose product is block_size; None: raster order
    """

    grid: tuple[int, int, int]
    block_size: int
    text_before: int = 0
    text_after: int = 0
    box: Box | None = None

    def __post_init__(self) -> None:
        problem = too_long(self.seq_len, self.block_size)
        if problem:
            raise PlanError(f"grid {' x '.join(map(str, self.grid))}: {problem}")

    @property
    def frames(self) -> int:
        """Latent frames."""
        return self.grid[0]

    @property
    def tokens_per_frame(self) -> int:
        """Height times width of the token grid."""
        return self.grid[1] * self.grid[2]

    @property
    def video_tokens(self) -> int:
        """Tokens of the whole video."""
        return self.frames * self.tokens_per_frame

    @property
    def seq_len(self) -> int:
        """Tokens of text and video."""
        return self.text_before + self.video_tokens + self.text_after

    @property
    def num_blocks(self) -> int:
        """Blocks of the sequence; the last one may be partial."""
        return cdiv(self.seq_len, self.block_size)

    def text_blocks(self) -> np.ndarray:
        """bool [n]: True for a block that holds at least one text token."""
        first = np.arange(self.num_blocks, dtype=np.int64) * self.block_size
        last = np.minimum(first + self.block_size, self.seq_len) - 1
        in_front = first < self.text_before
        behind = last >= self.text_before + self.video_tokens
        return in_front | behind

    def order(self) -> np.ndarray | None:
        """int64 [seq_len]: the token, in the model's order, of each place of the sequence; None in raster order."""
        if self.box is None:
            return None
        order = np.arange(self.seq_len, dtype=np.int64)
        order[self.text_before : self.text_before + self.video_tokens] = self.text_before + video_order(
            self.grid, self.box
        )
        return order

    def block_places(self) -> BlockPlaces:
        """Where the video tokens of each block lie, whatever the order."""
        token = np.arange(self.video_tokens, dtype=np.int64) if self.box is None else video_order(self.grid, self.box)
        places = np.stack(np.unravel_index(token, self.grid), axis=-1)
        blocks, starts = np.unique(
            (np.arange(self.video_tokens) + self.text_before) // self.block_size, return_index=True
        )
        counts = np.diff(np.append(starts, self.video_tokens))
        centre = np.add.reduceat(places, starts, axis=0) / counts[:, None]
        first = np.minimum.reduceat(places[:, 0], starts)
        last = np.maximum.reduceat(places[:, 0], starts)
        return BlockPlaces(blocks, counts, centre, first, last)

    def segments(self) -> Segments:
        """Cut the video tokens, in raster order, at every frame and block boundary."""
        begin, end = self.text_before, self.text_before + self.video_tokens
        frame_cuts = np.arange(begin, end, self.tokens_per_frame, dtype=np.int64)
        block_cuts = np.arange(cdiv(begin, self.block_size) * self.block_size, end, self.block_size)
        starts = np.union1d(frame_cuts, block_cuts)
        stops = np.append(starts[1:], end)
        frame = (starts - begin) // self.tokens_per_frame
        origin = begin + frame * self.tokens_per_frame
        return Segments(
            frame=frame.astype(np.int32),
            start=(starts - origin).astype(np.int32),
            stop=(stops - origin).astype(np.int32),
            block=(starts // self.block_size).astype(np.int32),
        )
