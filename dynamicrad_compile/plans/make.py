"""Planners: from a token grid and a few numbers to a `BlockPlan`. They need no tensors of a model."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import PlanError, nearest
from .layout import Layout
from .patterns.candidates import candidates
from .patterns.radial import THINNING_THRESHOLD, radial_mask
from .patterns.static_ratio import static_ratio_mask
from .plan import BlockPlan, Candidates
from .prior import Prior

__all__ = ["PATTERNS", "Layout", "Prior", "make_candidates", "make_plan", "radial_mask", "static_ratio_mask"]

BLOCK_SIZES = (16, 32, 64, 128, 256)
# Known names that this version can't build yet.
NOT_AVAILABLE = ("adaspa", "lvsa")
DECAY_RANGE = (1e-3, 1e3)
# Parameters of pattern "dynamicrad": the range of each and its value where nothing else is said.
NUMBERS: dict[str, tuple[float, float, float]] = {
    "decay_factor": (*DECAY_RANGE, 1.0),
    "adjacent_width": (0.1, 10.0, 1.0),
    "far_width": (0.01, 10.0, 1.0),
    "temporal_decay": (0.0, 8.0, 2.0),
    "thinning": (0.0, 8.0, 0.0),
    "compensate": (0.0, 1.0, 0.0),
}


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
        thinning_tokens=128  bands narrower than this skip frames; 128 as published, smaller for small frames
    Parameters of "dynamicrad" (see `planners.prior`), each None by default:
        sparsity           share of dense attention to skip, 0..1, compensation counted
        decay_factor       core of the prior, 0.001..1000
        adjacent_width     width of the adjacent frames' band relative to the same frame's, 0.1..10
        far_width          width of the farther frames' band, 0.01..10
        temporal_decay     exponent of 1 + frame distance, 0..8
        thinning           frequency reduction of far frames, 0..8
        sink_frames        leading frames that count as adjacent to every frame
        compensate         weight of the mean key that stands for a dropped block, 0..1
        regime             "low", "mid" or "high" motion; default "mid"
        profile            name or path of a profile; default "default"
        What is None comes from the profile's regime. The profile is read only if `sparsity` is None or
        `regime` or `profile` is given; otherwise widths, decay_factor and sink_frames are 1, temporal_decay 2, and
        thinning and compensate 0.

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
    _check_names(pattern, params, defaults)
    return build(_layout(grid, block_size, text_before, text_after), **{**defaults, **params})


def make_candidates(
    grid: Sequence[int],
    block_size: int = 128,
    text_before: int = 0,
    text_after: int = 0,
    **params: Any,
) -> Candidates:
    """Candidates of dynamic_threshold, for `select_blocks`; one regime, shared by all heads.

    Takes what `make_plan("dynamicrad", ...)` takes; `sparsity` is that of the candidate set, and a profile's numbers
    are those of its table dynamic_threshold. Tensors are int32 on the CPU. Raises PlanError, ProfileError.
    """
    defaults = PATTERNS["dynamicrad"][1]
    _check_names("dynamicrad", params, defaults)
    layout = _layout(grid, block_size, text_before, text_after)
    sparsity, prior, compensate = _parameters(layout, "dynamic_threshold", **{**defaults, **params})
    return candidates(layout, sparsity=sparsity, prior=prior, compensate=compensate)


def _check_names(pattern: str, params: dict[str, Any], known: dict[str, Any]) -> None:
    unknown = [name for name in params if name not in known]
    if unknown:
        accepted = f"it takes {list(known)}" if known else "it takes none"
        raise PlanError(
            f"unknown parameter {unknown[0]!r} of pattern {pattern!r}; {accepted}.{nearest(unknown[0], known)}"
        )


def _radial(layout: Layout, *, decay_factor: float, sink_frames: int, thinning_tokens: int) -> BlockPlan:
    decay_factor = _number("decay_factor", decay_factor, *DECAY_RANGE)
    sink_frames = _integer("sink_frames", sink_frames, 0)
    thinning_tokens = _integer("thinning_tokens", thinning_tokens, 1)
    mask = radial_mask(layout, decay_factor=decay_factor, sink_frames=sink_frames, thinning_tokens=thinning_tokens)
    return _plan_of_mask(mask, layout)


def _dynamicrad(layout: Layout, **params: Any) -> BlockPlan:
    sparsity, prior, compensate = _parameters(layout, "static_ratio", **params)
    mask = static_ratio_mask(layout, sparsity=sparsity, prior=prior)
    return _plan_of_mask(mask, layout, compensate)


def _parameters(
    layout: Layout, mode: str, *, sparsity: float | None, regime: str | None, profile: Any, **params: Any
) -> tuple[float, Prior, float]:
    """Sparsity of the blocks, prior and compensation. The mean keys cost 1 / block_size; the blocks pay for it."""
    fallback: dict[str, Any] = {"sink_frames": 1, **{name: default for name, (_, _, default) in NUMBERS.items()}}
    if sparsity is None or regime is not None or profile is not None:
        fallback = _profile_parameters("default" if profile is None else profile, regime or "mid", mode)
    given = {**fallback, **{name: value for name, value in params.items() if value is not None}}
    numbers = {name: _number(name, given[name], low, high) for name, (low, high, _) in NUMBERS.items()}
    sparsity = _number("sparsity", fallback["sparsity"] if sparsity is None else sparsity, 0.0, 1.0)
    compensate = numbers.pop("compensate")
    if compensate:
        sparsity = min(1.0, sparsity + 1.0 / layout.block_size) if sparsity else 0.0
    return sparsity, Prior(**numbers, sink_frames=_integer("sink_frames", given["sink_frames"], 0)), compensate


def _dense(layout: Layout) -> BlockPlan:
    return _plan_of_mask(np.ones((layout.num_blocks, layout.num_blocks), dtype=bool), layout)


# Pattern -> builder of its plan and the default of each parameter.
PATTERNS: dict[str, tuple[Callable[..., BlockPlan], dict[str, Any]]] = {
    "radial": (_radial, {"decay_factor": 1.0, "sink_frames": 1, "thinning_tokens": THINNING_THRESHOLD}),
    "dynamicrad": (
        _dynamicrad,
        dict.fromkeys(("sparsity", *NUMBERS, "sink_frames", "regime", "profile")),
    ),
    "dense": (_dense, {}),
}


def _profile_parameters(profile: Any, regime: str, mode: str) -> dict[str, Any]:
    """The table of one mode and regime of a profile (name, path or Profile)."""
    # Imported here because a plan with an explicit sparsity needs no profile, nor the validation library.
    from ..profiles import Profile, load_profile

    loaded = profile if isinstance(profile, Profile) else load_profile(profile)
    table = getattr(loaded.regime(regime), mode)
    if table is None:
        raise PlanError(f"profile {loaded.name!r} has no {mode} table for regime {regime!r}; give `sparsity`.")
    parameters: dict[str, Any] = table.model_dump()
    return parameters


def _plan_of_mask(mask: np.ndarray, layout: Layout, compensate: float = 0.0) -> BlockPlan:
    return BlockPlan.from_mask(
        torch.from_numpy(mask),
        block_q=layout.block_size,
        block_kv=layout.block_size,
        q_len=layout.seq_len,
        kv_len=layout.seq_len,
        compensate=compensate,
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
