"""Planners: from a token grid and a few numbers to a `BlockPlan`. They need no tensors of a model."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import PlanError, nearest
from ..plan import BlockPlan
from ._layout import Layout
from .radial import radial_mask
from .static_ratio import static_ratio_mask

__all__ = ["PATTERNS", "Layout", "make_plan", "radial_mask", "static_ratio_mask"]

BLOCK_SIZES = (16, 32, 64, 128, 256)
# Known names that this version can't build yet.
NOT_AVAILABLE = ("adaspa", "lvsa")
DECAY_RANGE = (1e-3, 1e3)


def make_plan(
    pattern: str = "radial",
    grid: Sequence[int] | None = None,
    block_size: int = 128,
    text_before: int = 0,
    text_after: int = 0,
    **params: Any,
) -> BlockPlan:
    """Build the plan of a video self-attention; one regime (P = 1), shared by all heads (H' = 1).

    pattern      "radial", "dynamicrad" or "dense"
    grid         (frames, height, width) of the video in latent tokens; required
    block_size   16, 32, 64, 128 or 256 tokens, for queries and keys alike
    text_before  text tokens in front of the video; they read and are read by everything
    text_after   text tokens behind the video

    Parameters of "radial" (see `planners.radial`):
        decay_factor=1.0   scales the windows, 0.001..1000
        sink_frames=1      leading frames that all tokens read (published: 1 for Wan, 0 for HunyuanVideo)
    Parameters of "dynamicrad" (see `planners.static_ratio`), each None by default:
        sparsity           share of blocks to skip, 0..1
        decay_factor       shape of the prior, 0.001..1000
        sink_frames        leading frames that count as adjacent to every frame
        regime             "low", "mid" or "high" motion; default "mid"
        profile            name or path of a profile; default "default"
        What is None comes from the profile's regime. The profile is read only if `sparsity` is None or
        `regime` or `profile` is given; otherwise decay_factor is 1.0 and sink_frames is 1.

    The plan's tensors are int32 on the CPU. Raises PlanError for an unknown pattern or parameter and for
    values out of their range, ProfileError if the profile can't be loaded.
    """
    if pattern in NOT_AVAILABLE:
        raise PlanError(f"pattern {pattern!r} is not available in this version. Use one of {list(PATTERNS)}.")
    if pattern not in PATTERNS:
        raise PlanError(
            f"unknown pattern {pattern!r}; expected one of {list(PATTERNS)}.{nearest(str(pattern), PATTERNS)}"
        )
    build, defaults = PATTERNS[pattern]
    unknown = [name for name in params if name not in defaults]
    if unknown:
        accepted = f"it takes {list(defaults)}" if defaults else "it takes none"
        raise PlanError(
            f"unknown parameter {unknown[0]!r} of pattern {pattern!r}; {accepted}.{nearest(unknown[0], defaults)}"
        )
    layout = _layout(grid, block_size, text_before, text_after)
    return _plan_of_mask(build(layout, **{**defaults, **params}), layout)


def _radial(layout: Layout, *, decay_factor: float, sink_frames: int) -> np.ndarray:
    decay_factor = _number("decay_factor", decay_factor, *DECAY_RANGE)
    sink_frames = _integer("sink_frames", sink_frames, 0)
    return radial_mask(layout, decay_factor=decay_factor, sink_frames=sink_frames)


def _dynamicrad(
    layout: Layout,
    *,
    sparsity: float | None,
    decay_factor: float | None,
    sink_frames: int | None,
    regime: str | None,
    profile: Any,
) -> np.ndarray:
    fallback: dict[str, Any] = {"decay_factor": 1.0, "sink_frames": 1}
    if sparsity is None or regime is not None or profile is not None:
        fallback = _profile_parameters("default" if profile is None else profile, regime or "mid")
    if sparsity is None:
        sparsity = fallback["sparsity"]
    if decay_factor is None:
        decay_factor = fallback["decay_factor"]
    if sink_frames is None:
        sink_frames = fallback["sink_frames"]
    return static_ratio_mask(
        layout,
        sparsity=_number("sparsity", sparsity, 0.0, 1.0),
        decay_factor=_number("decay_factor", decay_factor, *DECAY_RANGE),
        sink_frames=_integer("sink_frames", sink_frames, 0),
    )


def _dense(layout: Layout) -> np.ndarray:
    return np.ones((layout.num_blocks, layout.num_blocks), dtype=bool)


# Pattern -> builder of its mask and the default of each parameter.
PATTERNS: dict[str, tuple[Callable[..., np.ndarray], dict[str, Any]]] = {
    "radial": (_radial, {"decay_factor": 1.0, "sink_frames": 1}),
    "dynamicrad": (
        _dynamicrad,
        {"sparsity": None, "decay_factor": None, "sink_frames": None, "regime": None, "profile": None},
    ),
    "dense": (_dense, {}),
}


def _profile_parameters(profile: Any, regime: str) -> dict[str, Any]:
    """The static_ratio table of one regime of a profile (name, path or Profile)."""
    # Imported here because a plan with an explicit sparsity needs no profile, nor the validation library.
    from ..profiles import Profile, load_profile

    loaded = profile if isinstance(profile, Profile) else load_profile(profile)
    return loaded.regime(regime).static_ratio.model_dump()


def _plan_of_mask(mask: np.ndarray, layout: Layout) -> BlockPlan:
    return BlockPlan.from_mask(
        torch.from_numpy(mask),
        block_q=layout.block_size,
        block_kv=layout.block_size,
        q_len=layout.seq_len,
        kv_len=layout.seq_len,
    )


def _layout(grid: Any, block_size: Any, text_before: Any, text_after: Any) -> Layout:
    problem = f"grid must be three positive integers (frames, height, width) in latent tokens, got {grid!r}."
    try:
        sizes = tuple(operator.index(size) for size in grid)
    except TypeError:
        raise PlanError(problem) from None
    if len(sizes) != 3 or min(sizes) < 1 or any(isinstance(size, bool) for size in grid):
        raise PlanError(problem)
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise PlanError(f"block_size must be one of {list(BLOCK_SIZES)}, got {block_size!r}.")
    return Layout(
        grid=(sizes[0], sizes[1], sizes[2]),
        block_size=int(block_size),
        text_before=_integer("text_before", text_before, 0),
        text_after=_integer("text_after", text_after, 0),
    )


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise PlanError(f"{name} must be a number in {low:g}..{high:g}, got {value!r}.")
    if not low <= value <= high:
        raise PlanError(f"{name} must be in {low:g}..{high:g}, got {value!r}.")
    return float(value)


def _integer(name: str, value: Any, low: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low:
        raise PlanError(f"{name} must be an integer of at least {low}, got {value!r}.")
    return number
