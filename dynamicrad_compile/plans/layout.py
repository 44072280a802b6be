"""Where frames, text and blocks lie in a token sequence.

The sequence is [text_before | frames x height x width video tokens | text_after], cut into blocks of
`block_size` tokens from position 0. The last block may be partial. With a box the video is in the
order of `plans.order`.

All of these tokens are keys. The queries are all of them too, or a range of them: the video behind a prompt, the last
frames behind a cache of earlier ones, a shard. Their blocks are counted from the first query, so that they need not
begin where blocks of keys do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PlanError
from ..kernels.blocks import cdiv
from .order import Box, video_order

Range = tuple[int, int]
"""(start, stop) in tokens."""

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

    box      (frames, height, width) of a block, whose product is block_size; None: raster order
    queries  (start, stop) of the tokens that ask; None: all. All tokens are keys
    """

    grid: tuple[int, int, int]
    block_size: int
    text_before: int = 0
    text_after: int = 0
    box: Box | None = None
    queries: Range | None = None

    def __post_init__(self) -> None:
        problem = too_long(self.seq_len, self.block_size)
        if problem:
            raise PlanError(f"grid {' x '.join(map(str, self.grid))}: {problem}")
        if self.queries is not None:
            start, stop = self.queries
            if not 0 <= start < stop <= self.seq_len:
                raise PlanError(
                    f"queries must be tokens start < stop within 0..{self.seq_len}, the sequence of "
                    f"{self.text_before} + {self.video_tokens} + {self.text_after} tokens, got {self.queries}."
                )
            if (start, stop) == (0, self.seq_len):
                object.__setattr__(self, "queries", None)

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
        """Tokens of text and video: the keys."""
        return self.text_before + self.video_tokens + self.text_after

    @property
    def q_start(self) -> int:
        """The first query."""
        return 0 if self.queries is None else self.queries[0]

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.seq_len if self.queries is None else self.queries[1] - self.queries[0]

    @property
    def num_blocks(self) -> int:
        """Blocks of keys; the last one may be partial."""
        return cdiv(self.seq_len, self.block_size)

    @property
    def num_rows(self) -> int:
        """Blocks of queries; the last one may be partial."""
        return cdiv(self.q_len, self.block_size)

    def text_blocks(self) -> np.ndarray:
        """bool [n]: True for a block of keys that holds at least one text token."""
        return self._with_text(0, self.seq_len)

    def text_rows(self) -> np.ndarray:
        """bool [m]: True for a block of queries that holds at least one text token."""
        return self._with_text(self.q_start, self.q_start + self.q_len)

    def own_blocks(self) -> np.ndarray:
        """int64 [m]: the block of keys that holds most of a row's tokens, the earlier one of equals."""
        rows = np.arange(self.num_rows, dtype=np.int64)
        if self.queries is None:
            return rows
        order, asked = self.order(), self.query_order()
        token = self.q_start + (np.arange(self.q_len, dtype=np.int64) if asked is None else asked)
        place = token if order is None else np.argsort(order)[token]
        row = np.arange(self.q_len, dtype=np.int64) // self.block_size
        pairs, counts = np.unique(row * self.num_blocks + place // self.block_size, return_counts=True)
        row, block = np.divmod(pairs, self.num_blocks)
        best = np.lexsort((block, -counts, row))
        return block[best][np.searchsorted(row, rows)]

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first video token, number of tokens) of blocks of queries without text, in raster order; int64 [R] each."""
        first = self.q_start + rows * self.block_size
        length = np.minimum(self.block_size, self.q_start + self.q_len - first)
        return first - self.text_before, length

    def order(self) -> np.ndarray | None:
        """int64 [seq_len]: the token, in the model's order, of each place of the keys; None in raster order."""
        if self.box is None:
            return None
        order = np.arange(self.seq_len, dtype=np.int64)
        video = slice(self.text_before, self.text_before + self.video_tokens)
        order[video] = self.text_before + video_order(self.grid, self.box)
        return order

    def query_order(self) -> np.ndarray | None:
        """int64 [q_len]: the token, counted from the first query, of each place of the queries; None in raster order.

        Whole frames are a video of their own, whose blocks are boxes of it. Other tokens follow each other as they do
        in the order of the keys.
        """
        if self.queries is None:
            return self.order()
        first, last = self._asked_video
        keys = self.order()
        if keys is None or first == last:
            return None
        if first % self.tokens_per_frame or last % self.tokens_per_frame:
            own = keys[(keys >= self.q_start) & (keys < self.q_start + self.q_len)]
            return own - self.q_start
        order = np.arange(self.q_len, dtype=np.int64)
        begin = self.text_before + first - self.q_start
        grid = ((last - first) // self.tokens_per_frame, *self.grid[1:])
        order[begin : begin + last - first] = begin + video_order(grid, self.box)
        return order

    def block_places(self) -> BlockPlaces:
        """Where the video tokens of each block of keys lie, whatever the order."""
        return self._places(self.order(), 0, (0, self.video_tokens))

    def row_places(self) -> BlockPlaces:
        """Where the video tokens of each block of queries lie, whatever the order."""
        return self._places(self.query_order(), self.q_start, self._asked_video)

    def segments(self) -> Segments:
        """Cut the video tokens of the keys, in raster order, at every boundary of a frame or a block."""
        return self._cut(0, (0, self.video_tokens))

    def row_segments(self) -> Segments:
        """Cut the video tokens of the queries likewise, at the boundaries of their own blocks."""
        return self._cut(self.q_start, self._asked_video)

    @property
    def _asked_video(self) -> Range:
        """Video tokens among the queries."""
        low, high = self.q_start - self.text_before, self.q_start + self.q_len - self.text_before
        first = min(max(low, 0), self.video_tokens)
        return first, max(first, min(high, self.video_tokens))

    def _with_text(self, start: int, stop: int) -> np.ndarray:
        """bool: which blocks of the tokens `start..stop` hold text."""
        first = np.arange(start, stop, self.block_size, dtype=np.int64)
        last = np.minimum(first + self.block_size, stop) - 1
        in_front = first < self.text_before
        behind = last >= self.text_before + self.video_tokens
        return in_front | behind

    def _places(self, order: np.ndarray | None, start: int, video: Range) -> BlockPlaces:
        """Places of the video tokens `video` in a sequence that begins at token `start` of this one."""
        begin = self.text_before + video[0] - start
        place = begin + np.arange(video[1] - video[0], dtype=np.int64)
        token = (place if order is None else order[place]) + start - self.text_before
        places = np.stack(np.unravel_index(token, self.grid), axis=-1)
        blocks, starts = np.unique(place // self.block_size, return_index=True)
        counts = np.diff(np.append(starts, len(place)))
        centre = np.add.reduceat(places, starts, axis=0) / counts[:, None]
        first = np.minimum.reduceat(places[:, 0], starts)
        last = np.maximum.reduceat(places[:, 0], starts)
        return BlockPlaces(blocks, counts, centre, first, last)

    def _cut(self, start: int, video: Range) -> Segments:
        """Runs of the video tokens `video` in a sequence that begins at token `start` of this one."""
        begin, end = self.text_before + video[0], self.text_before + video[1]
        frame_cuts = np.arange(self.text_before, end, self.tokens_per_frame, dtype=np.int64)
        block_cuts = np.arange(start, end, self.block_size, dtype=np.int64)
        cuts = np.union1d(frame_cuts, block_cuts)
        starts = np.append(np.arange(begin, min(begin + 1, end)), cuts[cuts > begin])
        stops = np.append(starts, end)[1:]
        frame = (starts - self.text_before) // self.tokens_per_frame
        origin = self.text_before + frame * self.tokens_per_frame
        return Segments(
            frame=frame.astype(np.int32),
            start=(starts - origin).astype(np.int32),
            stop=(stops - origin).astype(np.int32),
            block=((starts - start) // self.block_size).astype(np.int32),
        )
