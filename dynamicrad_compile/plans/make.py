"""From a token grid and a few numbers to a `BlockPlan` or `Candidates`, by pattern. No tensor of a model is needed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import PlanError, nearest
from ..profiles import Profile, load_profile
from ..profiles.parameters import BLOCK_SIZES, StaticRatio
from .layout import Layout
from .patterns import PATTERNS, Pattern
from .plan import BlockPlan, Candidates


def make_plan(
    pattern: str = "radial",
    grid: Sequence[int] | None = None,
    block_size: int = 128,
    text_before: int = 0,
    text_after: int = 0,
    queries: Sequence[int] | None = None,
    **params: Any,
) -> BlockPlan:
    """Build the plan of a video self-attention; one regime (P = 1), shared by all heads (H' = 1).

    pattern      "radial", "dynamicrad", "lvsa" or "dense"
    grid         (frames, height, width) of the video in latent tokens; required
    block_size   16, 32, 64, 128 or 256 tokens, for queries and keys alike
    text_before  text tokens in front of the video; they read and are read by everything
    text_after   text tokens behind the video
    queries      (start, stop) of the tokens that ask, where not all do: the video behind a prompt, the last frames
                 behind a cache of earlier ones, a shard. All tokens are keys; None: all ask

    Parameters are those of `profiles.parameters`, which has their ranges and defaults: of "radial" decay_factor,
    sink_frames and thinning_tokens; of "lvsa" reference_frames, window, n_first, sparsity_scale, step and rule; of
    "dynamicrad" sparsity, decay_factor, adjacent_width, far_width, temporal_decay, thinning, sink_frames, compensate,
    covariance and box. "dynamicrad" also takes

        regime   "low", "mid" or "high" motion; default "mid"
        profile  name or path of a profile, or a Profile; default "default"

    If `sparsity` is None or one of these is given, what is None comes from the profile's regime; otherwise the profile
    is not read.

    The plan's tensors are int32 on the CPU. Raises PlanError for an unknown pattern or parameter, for values out of
    their range and for more than `layout.MAX_BLOCKS` blocks, ProfileError if the profile can't be loaded.
    """
    if pattern in PATTERNS and PATTERNS[pattern].needs == "search":
        raise PlanError(
            f"pattern {pattern!r} has no plan of its own: its blocks are found by the queries and keys of a run. "
            "Compile a model with it, or call torch.ops.dynamicrad.search_blocks."
        )
    if pattern not in PATTERNS:
        raise PlanError(
            f"unknown pattern {pattern!r}; expected one of {list(PATTERNS)}.{nearest(str(pattern), PATTERNS)}"
        )
    found = PATTERNS[pattern]
    layout, parameters = _checked(found, "static_ratio", (grid, block_size, text_before, text_after, queries), params)
    return found.plan(layout, parameters)


def make_candidates(
    grid: Sequence[int],
    block_size: int = 128,
    text_before: int = 0,
    text_after: int = 0,
    queries: Sequence[int] | None = None,
    **params: Any,
) -> Candidates:
    """Candidates of dynamic_threshold, for `select_blocks`; one regime, shared by all heads.

    Takes what `make_plan("dynamicrad", ...)` takes; `sparsity` is that of the candidate set, and a profile's numbers
    are those of its table dynamic_threshold. Tensors are int32 on the CPU. Raises PlanError, ProfileError.
    """
    found = PATTERNS["dynamicrad"]
    where = (grid, block_size, text_before, text_after, queries)
    layout, parameters = _checked(found, "dynamic_threshold", where, params)
    return found.candidates(layout, parameters)


def _checked(found: Pattern[Any], mode: str, where: Sequence[Any], params: dict[str, Any]) -> tuple[Layout, Any]:
    """Layout and parameters of a call."""
    if found.parameters is not StaticRatio:
        found.check_names(params)
        return _layout(*where), found.checked(params)
    found.check_names(params, ("regime", "profile"))
    given = {name: value for name, value in params.items() if value is not None}
    regime, profile = given.pop("regime", None), given.pop("profile", None)
    if "sparsity" not in given or regime is not None or profile is not None:
        given = {**_profile_parameters("default" if profile is None else profile, regime or "mid", mode), **given}
    parameters = found.checked(given)
    layout = replace(_layout(*where), box=parameters.box_sizes)
    if params.get("box") is not None and layout.box is not None and math.prod(layout.box) != layout.block_size:
        raise PlanError(
            f"a box is one block: its frames x height x width must be block_size {layout.block_size}, got "
            f"{'x'.join(map(str, layout.box))} = {math.prod(layout.box)}."
        )
    return layout, parameters


def _profile_parameters(profile: Any, regime: str, mode: str) -> dict[str, Any]:
    """The numbers of one mode and regime of a profile (name, path or Profile), without a choice at run time."""
    loaded = profile if isinstance(profile, Profile) else load_profile(profile)
    table = getattr(loaded.regime(regime), mode)
    if table is None:
        raise PlanError(f"profile {loaded.name!r} has no {mode} table for regime {regime!r}; give `sparsity`.")
    parameters: dict[str, Any] = table.changed().model_dump()
    return parameters


def _layout(grid: Any, block_size: Any, text_before: Any, text_after: Any, queries: Any) -> Layout:
    problem = f"grid must be three positive integers (frames, height, width) in latent tokens, got {grid!r}."
    sizes = _integers(grid, 3, problem)
    if min(sizes) < 1:
        raise PlanError(problem)
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise PlanError(f"block_size must be one of {list(BLOCK_SIZES)}, got {block_size!r}.")
    asked = None
    if queries is not None:
        wanted = f"queries must be two integers (start, stop) in tokens of the sequence, or None, got {queries!r}."
        start, stop = _integers(queries, 2, wanted)
        asked = (start, stop)
    return Layout(
        grid=(sizes[0], sizes[1], sizes[2]),
        block_size=int(block_size),
        text_before=_count("text_before", text_before),
        text_after=_count("text_after", text_after),
        queries=asked,
    )


def _integers(values: Any, number: int, problem: str) -> tuple[int, ...]:
    """So many integers. Raises PlanError with `problem`."""
    try:
        found = tuple(operator.index(value) for value in values)
    except TypeError:
        raise PlanError(problem) from None
    if len(found) != number or any(isinstance(value, bool) for value in values):
        raise PlanError(problem)
    return found


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or number < 0:
        raise PlanError(f"{name} must be an integer of at least 0, got {value!r}.")
    return number
