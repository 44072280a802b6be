"""Pictures of block masks, of the kind that the name of the file ends in; see `canvas`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from ..errors import PlanError
from ..plans.plan import BlockPlan
from .canvas import Canvas, Color, canvas_for
from .plot_text import average, chosen_mask, skipped

MIN_PIXELS = 720
MAX_BLOCKS = 1200
MARGIN_LEFT, MARGIN_TOP, MARGIN_RIGHT, MARGIN_BOTTOM = 86, 62, 24, 86
MAX_TICKS = 11

INK, FAINT = (32, 36, 44), (120, 126, 138)
SKIPPED, KEPT = (238, 240, 244), (24, 78, 140)
FRAME_LINE, TEXT_BAND = (226, 106, 44), (60, 158, 92)
ONLY_FIRST, ONLY_SECOND, NO_ROW = (248, 200, 64), (196, 44, 70), (150, 154, 164)


def frame_boundaries(grid: Sequence[int], text_before: int = 0) -> list[int]:
    """Token positions where the frames of a video begin, and where the last one ends: F + 1 numbers."""
    frames, height, width = grid
    return [text_before + frame * height * width for frame in range(frames + 1)]


def plot_mask(
    plan: BlockPlan,
    path: str | os.PathLike[str],
    regime: int = 0,
    head: int = 0,
    title: str | None = None,
    boundaries: Sequence[int] | None = None,
) -> None:
    """Write the block mask of one regime and head as a picture: rows are queries, columns keys, dark means kept.

    path        ending in .svg, or in .png, .jpg, .webp, .pdf or another kind that pillow writes
    boundaries  ascending token positions, as from `frame_boundaries`: a line is drawn at each, and what lies
                before the first or behind the last is marked as text
    title       shown in front of the sparsity

    The picture is at least 720 pixels wide. More than 1200 blocks are averaged, so shades mean partly kept.
    Raises PlanError if the regime or head does not exist, for another ending, or if pillow is needed and missing.
    """
    mask = chosen_mask(plan, regime, head)
    sparsity = skipped(mask)
    picture = _Picture(path, _downsample(mask), (plan.q_len, plan.kv_len), (plan.block_q, plan.block_kv))
    picture.draw_boundaries(boundaries)
    picture.draw_axes(f"{title}: {sparsity}" if title else sparsity)
    picture.draw_legend([("read", KEPT), ("skipped", SKIPPED)], boundaries)
    picture.canvas.save(path)


def plot_difference(
    first: np.ndarray,
    second: np.ndarray,
    path: str | os.PathLike[str],
    *,
    block_size: int,
    seq_len: int,
    names: tuple[str, str] = ("first", "second"),
    title: str | None = None,
    boundaries: Sequence[int] | None = None,
) -> None:
    """Write a picture that shows where two block masks (bool [n, n] and [m, m], m <= n) differ.

    Blocks kept by both, by one, or by none have their own colours; rows and columns that the smaller mask
    lacks are grey. Blocks are `block_size` tokens; `seq_len` is the length in tokens that the first mask
    covers.
    Raises PlanError as `plot_mask` does, and if the shapes do not fit.
    """
    n, m = len(first), len(second)
    if first.shape != (n, n) or second.shape != (m, m) or m > n:
        raise PlanError(f"expected masks [n, n] and [m, m] with m <= n, got {first.shape} and {second.shape}.")
    colors = np.empty((n, n, 3), dtype=np.float64)
    colors[...] = NO_ROW
    here, there = first[:m, :m], second
    part = colors[:m, :m]
    part[...] = SKIPPED
    part[here & there] = KEPT
    part[here & ~there] = ONLY_FIRST
    part[there & ~here] = ONLY_SECOND
    picture = _Picture(path, average(colors, MAX_BLOCKS), (seq_len, seq_len), (block_size, block_size))
    picture.draw_boundaries(boundaries)
    counts = f"{(here & ~there).sum()} blocks only in {names[0]}, {(there & ~here).sum()} only in {names[1]}"
    picture.draw_axes(f"{title}: {counts}" if title else counts)
    entries = [("both", KEPT), (f"only {names[0]}", ONLY_FIRST), (f"only {names[1]}", ONLY_SECOND)]
    if m < n:
        entries.append((f"missing in {names[1]}", NO_ROW))
    picture.draw_legend(entries, boundaries)
    picture.canvas.save(path)


def _downsample(mask: np.ndarray) -> np.ndarray:
    """Colours [rows, columns, 3] of a mask; more than MAX_BLOCKS blocks are averaged."""
    share = average(mask.astype(np.float64)[..., None], MAX_BLOCKS)
    return np.asarray(SKIPPED) * (1 - share) + np.asarray(KEPT) * share


class _Picture:
    """A heatmap with axes in blocks; `canvas` is the picture so far."""

    canvas: Canvas

    def __init__(
        self,
        path: str | os.PathLike[str],
        colors: np.ndarray,
        lengths: tuple[int, int],
        block: tuple[int, int],
    ) -> None:
        rows, columns = colors.shape[:2]
        scale = max(1, math.ceil(MIN_PIXELS / max(rows, columns)))
        self.size = (columns * scale, rows * scale)
        self.lengths, self.block = lengths, block
        self.blocks = tuple(-(-length // size) for length, size in zip(lengths, block, strict=True))
        self.height = self.size[1] + MARGIN_TOP + MARGIN_BOTTOM
        self.canvas = canvas_for(path, (max(self.size[0], MIN_PIXELS) + MARGIN_LEFT + MARGIN_RIGHT, self.height))
        self.canvas.cells(colors, (MARGIN_LEFT, MARGIN_TOP), scale)

    def _x(self, token: float) -> float:
        return MARGIN_LEFT + token / self.block[1] / self.blocks[1] * self.size[0]

    def _y(self, token: float) -> float:
        return MARGIN_TOP + token / self.block[0] / self.blocks[0] * self.size[1]

    def draw_boundaries(self, boundaries: Sequence[int] | None) -> None:
        """Lines at the boundaries; bands over the text before the first and behind the last."""
        if not boundaries:
            return
        left, top = MARGIN_LEFT, MARGIN_TOP
        right, bottom = left + self.size[0] - 1, top + self.size[1] - 1
        spacing = self.size[1] / max(1, len(boundaries))
        line = (*FRAME_LINE, 200 if spacing >= 12 else 90)
        for token in boundaries:
            x, y = min(round(self._x(token)), right), min(round(self._y(token)), bottom)
            self.canvas.line((x, top), (x, bottom), line)
            self.canvas.line((left, y), (right, y), line)
        # Coloured rulers beside the axes; a tint would hide the mask.
        for begin, end in ((0, boundaries[0]), (boundaries[-1], self.lengths[1])):
            if end > begin:
                x0, x1 = round(self._x(begin)), max(round(self._x(end)), round(self._x(begin)) + 3)
                self.canvas.rectangle((x0, top - 9), (min(x1, right), top - 4), TEXT_BAND)
        for begin, end in ((0, boundaries[0]), (boundaries[-1], self.lengths[0])):
            if end > begin:
                y0, y1 = round(self._y(begin)), max(round(self._y(end)), round(self._y(begin)) + 3)
                self.canvas.rectangle((left - 9, y0), (left - 4, min(y1, bottom)), TEXT_BAND)

    def draw_axes(self, title: str) -> None:
        """Border, ticks in blocks, axis labels and the title."""
        left, top = MARGIN_LEFT, MARGIN_TOP
        right, bottom = left + self.size[0], top + self.size[1]
        draw = self.canvas
        draw.rectangle((left - 1, top - 1), (right, bottom), outline=INK)
        draw.text((left, 18), title, INK)
        for block in _ticks(self.blocks[1]):
            x = round(self._x((block + 0.5) * self.block[1]))
            draw.line((x, bottom + 1), (x, bottom + 5), INK)
            draw.text((x, bottom + 8), str(block), INK, "mt", small=True)
        for block in _ticks(self.blocks[0]):
            y = round(self._y((block + 0.5) * self.block[0]))
            draw.line((left - 15, y), (left - 11, y), INK)
            draw.text((left - 19, y), str(block), INK, "rm", small=True)
        label = f"key block ({self.block[1]} tokens, {self.lengths[1]} in all)"
        draw.text(((left + right) / 2, bottom + 30), label, INK, "mt")
        label = f"query block ({self.block[0]} tokens, {self.lengths[0]} in all)"
        draw.upward_text((17, (top + bottom) / 2), label, INK)

    def draw_legend(self, entries: Sequence[tuple[str, Color]], boundaries: Sequence[int] | None) -> None:
        """Colour boxes with their meaning, under the axis."""
        if boundaries:
            entries = [*entries, ("frame boundary", FRAME_LINE)]
            if boundaries[0] > 0 or boundaries[-1] < max(self.lengths):
                entries.append(("text", TEXT_BAND))
        x, y = MARGIN_LEFT, self.height - 24
        for name, color in entries:
            self.canvas.rectangle((x, y), (x + 12, y + 12), color, FAINT)
            self.canvas.text((x + 18, y + 6), name, INK, "lm", small=True)
            x += 18 + round(self.canvas.width(name)) + 22


def _ticks(blocks: int) -> list[int]:
    """At most MAX_TICKS round block numbers from 0."""
    step = 1
    for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000):
        step = factor
        if (blocks - 1) // step + 1 <= MAX_TICKS:
            break
    return list(range(0, blocks, step))
