"""Parameters of plans: the range and the default of each, in frozen types that check them. Imports no torch.

Options, profiles, the tuner and the patterns take their ranges from here. Unknown names are errors and types are not
converted; the types raise pydantic's ValidationError, which their readers put into their own words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

BlockSize = Literal[16, 32, 64, 128, 256]
Criterion = Literal["threshold", "mass", "ratio"]  # kernels/select_criteria.py is the op's own list
Rank = Literal["mass", "error"]
PatternName = Literal["dynamicrad", "radial", "adaspa", "lvsa", "dense"]
Mode = Literal["static_ratio", "dynamic_threshold"]
RegimeName = Literal["low", "mid", "high"]

BLOCK_SIZES: tuple[int, ...] = get_args(BlockSize)
"""Tokens of a query block and of a key block."""
MODES: tuple[str, ...] = get_args(Mode)
REGIMES: tuple[str, ...] = get_args(RegimeName)
"""Amounts of motion."""

Box = tuple[int, int, int] | Literal["raster"]
"""What a block is: frames, height and width of a box in latent tokens, or a run of tokens in raster order."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Schedule = tuple[tuple[float, float], ...]
"""(start, sparsity) of each stage of a run, in order; starts are shares of its steps, or timesteps."""
ScheduleBy = Literal["step", "timestep"]
DecayFactor = Annotated[float, Field(ge=1e-3, le=1e3)]
Count = Annotated[int, Field(ge=0)]


def checked_schedule(value: Sequence[Any], by: str = "step") -> Schedule:
    """A schedule of sparsity from pairs. Raises ValueError, which says what is expected."""
    starts = "shares of the steps, from 0.0 up" if by == "step" else "timesteps, in the order of a run"
    expected = f"expected a number, or pairs (start, sparsity), sparsities in 0..1; starts are {starts}"
    pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else () for pair in value]
    if not pairs or any(
        len(pair) != 2 or not all(_is_number(x) for x in pair) or not 0 <= pair[1] <= 1 for pair in pairs
    ):
        raise ValueError(expected)
    found = tuple((float(start), float(sparsity)) for start, sparsity in pairs)
    ways = {(later > earlier) - (later < earlier) for (earlier, _), (later, _) in itertools.pairwise(found)}
    if len(ways) > 1 or 0 in ways:
        raise ValueError(f"{expected}, each later than the one before")
    if by == "step" and (found[0][0] != 0 or not all(0 <= start < 1 for start, _ in found)):
        raise ValueError(f"{expected}, below 1.0")
    return found


def checked_steps(value: Any) -> tuple[int, ...]:
    """Numbers of denoising steps, ascending. Raises ValueError, which says what is expected."""
    steps = tuple(value) if isinstance(value, (list, tuple)) else ()
    whole = all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps)
    if not steps or not whole or any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError("expected numbers of steps from 0, each larger than the one before")
    return steps


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


class Table(BaseModel):
    """Base of all checked tables: frozen, strict, no unknown names, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dense(Table):
    """Pattern "dense" has no parameters."""


class Radial(Table):
    """Parameters of pattern "radial", see `plans.patterns.radial`.

    decay_factor     scales the windows
    sink_frames      leading frames that all tokens read (published: 1 for Wan, 0 for HunyuanVideo)
    thinning_tokens  bands narrower than this skip frames; 128 as published, smaller for small frames
    """

    decay_factor: DecayFactor = 1.0
    sink_frames: Count = 1
    thinning_tokens: Annotated[int, Field(ge=1)] = 128


class LVSA(Table):
    """Parameters of pattern "lvsa", see `plans.patterns.lvsa`. Frames are latent ones.

    reference_frames  frames that the model was trained for: Wan 21, Wan2.2 5B 31, HunyuanVideo 1.5 33, CogVideoX 13
    window            frames on either side of a query's frame that are read
    n_first           leading frames that are read by all, at every step
    sparsity_scale    reads so many times `reference_frames` frames
    step              number of the denoising step, from 0; the frames that are read by all rotate with it
    rule              "published" as its code has it; "exact": every frame reads as many frames as it should
    """

    reference_frames: Annotated[int, Field(ge=1)] = 21
    window: Count = 3
    n_first: Count = 1
    sparsity_scale: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    step: Count = 0
    rule: Literal["published", "exact"] = "published"


class Prior(Table):
    """Shape of the radial prior, see `plans.prior`.

    decay_factor    core of the prior: larger spends more on wide neighbourhoods
    adjacent_width  width of the band of adjacent frames, relative to the same frame's
    far_width       width of the band of farther frames
    temporal_decay  exponent of 1 + frame distance
    thinning        frequency reduction: far frames count only at distances that are multiples of
                    floor(distance * thinning / frames); 0 = none
    sink_frames     leading latent frames that count as adjacent to every frame
    """

    decay_factor: DecayFactor = 1.0
    adjacent_width: Annotated[float, Field(ge=0.1, le=10.0)] = 1.0
    far_width: Annotated[float, Field(ge=0.01, le=10.0)] = 1.0
    temporal_decay: Annotated[float, Field(ge=0.0, le=8.0)] = 2.0
    thinning: Annotated[float, Field(ge=0.0, le=8.0)] = 0.0
    sink_frames: Count = 1


class Blocks(Table):
    """What a block is, and what stands for a dropped one.

    compensate  weight of the mean key and value that stand for each dropped block; 0 = none
    covariance  what stands for dropped blocks varies with the query, by their covariances (`kernels.moments_op`);
                nothing without compensation
    box         [frames, height, width] of the box of latent tokens that a block is, or "raster": a run of tokens in
                raster order. The width is what frames and height leave of the block (`plans.order`)
    """

    compensate: Share = 0.0
    covariance: bool = False
    box: Box = "raster"

    @field_validator("box", mode="plain")
    @classmethod
    def _three_sizes(cls, value: Any) -> Any:
        if value == "raster":
            return value
        sizes = tuple(value) if isinstance(value, (list, tuple)) else ()
        if len(sizes) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes):
            raise ValueError('expected "raster" or [frames, height, width], three positive integers')
        return sizes

    @property
    def box_sizes(self) -> tuple[int, int, int] | None:
        """The box; None in raster order."""
        if self.box == "raster":
            return None
        frames, height, width = self.box
        return int(frames), int(height), int(width)


class AdaSpa(Blocks):
    """Parameters of pattern "adaspa", see `plans.patterns.adaspa`.

    sparsity          share of dense attention that is skipped between searches, compensation counted
    search_steps      denoising steps, from 0, that look for the blocks that are then read; all is dense up to the first
    recall_threshold  heads that keep more than this share of their attention get sparser, as many of the worst get
                      denser; 1: all heads have one sparsity
    rank              what blocks are chosen by: "mass", their share of the attention; "error", what would be wrong if
                      their mean stood for them. Both are exact (`kernels.search_op`)
    """

    sparsity: Share = 0.8
    search_steps: tuple[int, ...] = (10, 30)
    recall_threshold: Annotated[float, Field(ge=0.0)] = 1.0
    rank: Rank = "mass"

    @field_validator("search_steps", mode="plain")
    @classmethod
    def _ascending(cls, value: Any) -> Any:
        return checked_steps(value)


class StaticRatio(Blocks, Prior):
    """Parameters of pattern "dynamicrad" for one regime: a budget, spent by the prior (`Prior`), and what a block is.

    sparsity    share of dense attention that a plan skips, compensation counted
    """

    sparsity: Share

    def changed(self, **values: Any) -> StaticRatio:
        """The plan's parameters with other values, without a choice at run time. Raises ValidationError."""
        return StaticRatio(**{**self.model_dump(include=set(StaticRatio.model_fields)), **values})


class DynamicThreshold(StaticRatio):
    """Parameters of mode dynamic_threshold for one regime: the candidates are a static plan, `select_blocks` thins it.

    sparsity   share of dense attention that the candidates skip; what is executed is sparser
    criterion  "threshold": a block stays if the logarithm of its mass over the row's mean mass reaches near or far
               "mass": the best blocks stay that together have the share near (far) of their group's mass
               "ratio": the share near (far) of a group's blocks stays
    near       for blocks of the same frame, adjacent ones and sink frames; of boxes for all
    far        for all other frames
    rank       what blocks are chosen by: "mass", their share of the attention; "error", what would be wrong if their
               mean stood for them (`kernels.select_op`)
    """

    criterion: Criterion = "threshold"
    rank: Rank = "mass"
    near: Annotated[float, Field(ge=-20.0, le=20.0)]
    far: Annotated[float, Field(ge=-20.0, le=20.0)]

    @model_validator(mode="after")
    def _shares(self) -> DynamicThreshold:
        for name in ("near", "far"):
            if self.criterion != "threshold" and not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share in 0..1 where criterion is {self.criterion!r}")
        return self


def limits(parameters: type[Table], name: str) -> tuple[Any, Any]:
    """Least and largest value of a parameter; None where there is no such limit."""
    metadata = parameters.model_fields[name].metadata
    found = (next((getattr(m, end) for m in metadata if hasattr(m, end)), None) for end in ("ge", "le"))
    low, high = found
    return low, high
