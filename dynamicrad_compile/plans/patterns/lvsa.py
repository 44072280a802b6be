"""Pattern "lvsa": LVSA's mask of one denoising step: a window of frames, and frames that all read, rotating by step.

Source: Glorian et al., "LVSA" (2026), and its code (sparse_attention.py). It is for videos longer than the model was
trained for: every frame then reads about as many frames as it did in training. With F frames and

    target  = max(n_first + 1, floor(reference_frames * sparsity_scale))    frames that a frame should read
    width   = 2 window + 1

all is dense if F <= target. Otherwise frame f reads

    globals   the first n_first frames, and frames at a distance of about `key_frame_interval`, shifted by
              step mod key_frame_interval: after as many steps each frame has been global
    window    the frames nearest to f that are not global, `width` of them, the earlier of two at one distance first;
              none if window = 0

Rule "published" is the code's, with w' = 2 window + n_first:

    interval  the larger of: the largest k for which {0, k, 2k, ...} and the first frames are at least
              max(n_first, target - min(width, F)) frames; ceil((F - w') / max(target - w', 1))
    globals   (offset + i * interval) mod F for i < ceil(F / interval)

It may read fewer frames than the target (F = 22 with target 21: 18; F = 41 with 33: 28), more where the window alone
exceeds it, and one more or less by step, since the last distance of the circle is what is left.

Rule "exact" reads exactly `target` frames, always: the window has w = min(width, target - n_first) frames (0 if window
= 0), and there are target - w globals at every step. Of these a = target - w - n_first rotate: frames n_first +
(offset + floor(i r / a)) mod r for i < a, with r = F - n_first; so distances on the circle differ by at most one. The
interval is ceil(r / a), 1 where none rotates.

Blocks are runs of tokens and may straddle frames: a pair of blocks is kept if any of its pairs of frames is, so that
no pair of tokens is lost. What that computes in vain is 1 - `efficiency`; `block_size_for` keeps it small. Text is
read by all and reads all; a row's own block is always kept.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import PlanError
from ...profiles.parameters import BLOCK_SIZES, LVSA
from ..layout import Layout, Range, too_long
from ..plan import BlockPlan
from .pattern import Pattern, plan_of_mask

ENOUGH = 0.9
"""Share of the computed pairs of tokens that should be wanted."""


def target_frames(parameters: LVSA) -> int:
    """Frames that each frame should read; videos of at most so many are dense."""
    return max(parameters.n_first + 1, int(parameters.reference_frames * parameters.sparsity_scale))


def key_frame_interval(frames: int, parameters: LVSA) -> int:
    """Distance of the rotating globals, and number of different masks over the steps: mask s is that of s mod this."""
    target, first = target_frames(parameters), parameters.n_first
    if frames <= target:
        return 1
    if parameters.rule == "exact":
        rotating = target - first - _window_frames(parameters)
        return math.ceil((frames - first) / rotating) if rotating else 1
    wanted = max(first, target - min(2 * parameters.window + 1, frames))
    strict = next(k for k in range(frames, 0, -1) if len({*range(first), *range(0, frames, k)}) >= wanted)
    both = 2 * parameters.window + first
    return max(strict, math.ceil((frames - both) / max(target - both, 1)))


def global_frames(frames: int, parameters: LVSA) -> np.ndarray:
    """bool [F]: the frames that all read at this step."""
    first, interval = min(parameters.n_first, frames), key_frame_interval(frames, parameters)
    found = np.zeros(frames, dtype=bool)
    found[:first] = True
    offset = parameters.step % interval
    if frames <= target_frames(parameters):
        found[:] = True
    elif parameters.rule == "exact":
        rotating, rest = target_frames(parameters) - first - _window_frames(parameters), frames - first
        found[first + (offset + np.arange(rotating) * rest // max(rotating, 1)) % rest] = True
    else:
        found[(offset + np.arange(math.ceil(frames / interval)) * interval) % frames] = True
    return found


def _window_frames(parameters: LVSA) -> int:
    """Frames of a window that are not global, if there are as many."""
    if not parameters.window:
        return 0
    width = 2 * parameters.window + 1
    return min(width, target_frames(parameters) - parameters.n_first) if parameters.rule == "exact" else width


def frame_mask(frames: int, parameters: LVSA) -> np.ndarray:
    """bool [F, F]: which frames (columns) each frame (row) reads at this step."""
    everywhere = global_frames(frames, parameters)
    number = np.arange(frames)
    # Nearest first, of two at one distance the earlier; globals last.
    rank = 2 * np.abs(number[:, None] - number) + (number > number[:, None]) + 2 * frames * everywhere
    width = min(_window_frames(parameters), frames - int(everywhere.sum()))
    mask = np.broadcast_to(everywhere, (frames, frames)).copy()
    np.put_along_axis(mask, rank.argsort(axis=1)[:, :width], True, axis=1)
    return mask


def lvsa_mask(layout: Layout, parameters: LVSA | None = None) -> np.ndarray:
    """Block mask of one step, bool [m, n] with m = layout.num_rows and n = layout.num_blocks."""
    wanted = frame_mask(layout.frames, parameters or LVSA())
    asking, seg = layout.row_segments(), layout.segments()
    mask = np.zeros((layout.num_rows, layout.num_blocks), dtype=bool)
    if len(asking.block):
        rows, first_row = np.unique(asking.block, return_index=True)
        blocks, first_segment = np.unique(seg.block, return_index=True)
        kept = np.logical_or.reduceat(wanted[asking.frame], first_row, axis=0)[:, seg.frame]
        mask[rows[0] : rows[-1] + 1, blocks[0] : blocks[-1] + 1] = np.logical_or.reduceat(kept, first_segment, axis=1)
    mask[np.arange(len(mask)), layout.own_blocks()] = True
    mask[layout.text_rows()] = True
    mask[:, layout.text_blocks()] = True
    return mask


def efficiency(layout: Layout, parameters: LVSA | None = None) -> float:
    """Wanted pairs of tokens over computed ones, in 0..1: 1 where no block straddles a frame's or the text's end."""
    parameters = parameters or LVSA()
    asking = layout.row_segments()
    asked = np.bincount(asking.frame, weights=asking.stop - asking.start, minlength=layout.frames)
    text = layout.seq_len - layout.video_tokens
    read = layout.tokens_per_frame * frame_mask(layout.frames, parameters).sum(axis=1) + text
    wanted = float(asked @ read) + float(layout.q_len - asked.sum()) * layout.seq_len
    rows, columns = (_lengths(n, layout.block_size) for n in (layout.q_len, layout.seq_len))
    return wanted / float(rows @ (lvsa_mask(layout, parameters) @ columns))


def _lengths(tokens: int, block_size: int) -> np.ndarray:
    """float64: tokens of each block."""
    starts = np.arange(0, tokens, block_size)
    return np.minimum(block_size, tokens - starts).astype(np.float64)


def block_size_for(
    grid: tuple[int, int, int],
    text_before: int = 0,
    text_after: int = 0,
    wanted: int = 128,
    parameters: LVSA | None = None,
    queries: Range | None = None,
) -> int:
    """The largest block size, of at most `wanted` tokens, whose efficiency is ENOUGH; else the most efficient one.

    Sizes that would cut the sequence into too many blocks are passed over. Raises PlanError if none is left, or
    `wanted` is no block size.
    """
    if wanted not in BLOCK_SIZES:
        raise PlanError(f"wanted must be one of {list(BLOCK_SIZES)} tokens, got {wanted!r}.")
    tokens = text_before + math.prod(grid) + text_after
    problem = too_long(tokens, wanted)
    if problem:
        raise PlanError(problem)
    best = (0.0, wanted)
    for size in (size for size in reversed(BLOCK_SIZES) if size <= wanted and not too_long(tokens, size)):
        found = efficiency(Layout(grid, size, text_before, text_after, queries=queries), parameters)
        if found >= ENOUGH:
            return size
        best = max(best, (found, size))
    return best[1]


def lvsa_plan(layout: Layout, parameters: LVSA) -> BlockPlan:
    """The plan of LVSA's mask at one step."""
    return plan_of_mask(lvsa_mask(layout, parameters), layout)


LVSA_PATTERN = Pattern("lvsa", LVSA, lvsa_plan, needs="step", cycle=key_frame_interval, block_size=block_size_for)
