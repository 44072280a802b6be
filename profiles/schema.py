"""Schema of a profile file, version 1.

    schema = 1

    [profile]            name, description, pattern, mode, block_size, dense_layers, dense_steps, min_tokens
    [match]              what the profile was tuned for; profile = "auto" picks by it
    [provenance]         where the numbers are from; every key is optional
    [regimes.low]        one table each for low, mid and high motion
    static_ratio = { sparsity = 0.85, decay_factor = 1.0, sink_frames = 1 }
    dynamic_threshold = { sparsity = 0.6, criterion = "threshold", near = 0.0, far = 0.5 }

Unknown keys are errors, types are not converted, and the models are frozen.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dynamicrad_compile.errors import ProfileError, nearest

SCHEMA_VERSION = 1
REGIMES = ("low", "mid", "high")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StaticRatio(_Table):
    """Parameters of the static_ratio planner for one regime; the prior's are explained in `planners.prior`.

    sparsity        share of dense attention that a plan skips, compensation counted
    decay_factor    core of the prior: larger spends more on wide neighbourhoods
    adjacent_width  width of the band of adjacent frames, relative to the same frame's
    far_width       width of the band of farther frames
    temporal_decay  exponent of 1 + frame distance
    thinning        frequency reduction of far frames; 0 = none
    sink_frames     leading latent frames that count as adjacent to every frame
    compensate      weight of the mean key and value that stand for each dropped block; 0 = none
    """

    sparsity: Annotated[float, Field(ge=0.0, le=1.0)]
    decay_factor: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    adjacent_width: Annotated[float, Field(ge=0.1, le=10.0)] = 1.0
    far_width: Annotated[float, Field(ge=0.01, le=10.0)] = 1.0
    temporal_decay: Annotated[float, Field(ge=0.0, le=8.0)] = 2.0
    thinning: Annotated[float, Field(ge=0.0, le=8.0)] = 0.0
    sink_frames: Annotated[int, Field(ge=0)] = 1
    compensate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


class DynamicThreshold(StaticRatio):
    """Parameters of dynamic_threshold for one regime: the candidates are a static plan, `select_blocks` thins it.

    sparsity   share of dense attention that the candidates skip; what is executed is sparser
    criterion  "threshold": a block stays if the logarithm of its mass over the row's mean mass reaches near or far
               "mass": the best blocks stay that together have the share near (far) of their group's mass
               "ratio": the share near (far) of a group's blocks stays
    near       for blocks of the same frame, adjacent ones and sink frames
    far        for all other frames
    """

    criterion: Literal["threshold", "mass", "ratio"] = "threshold"
    near: Annotated[float, Field(ge=-20.0, le=20.0)]
    far: Annotated[float, Field(ge=-20.0, le=20.0)]

    @model_validator(mode="after")
    def _shares(self) -> DynamicThreshold:
        for name in ("near", "far"):
            if self.criterion != "threshold" and not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share in 0..1 where criterion is {self.criterion!r}")
        return self


class Regime(_Table):
    """Parameters of one regime of motion, one table a mode."""

    static_ratio: StaticRatio
    dynamic_threshold: DynamicThreshold | None = None


class Regimes(_Table):
    """The three regimes of motion."""

    low: Regime
    mid: Regime
    high: Regime


class Provenance(_Table):
    """Where the numbers are from. `sparsity` and `loss` are those the optimizer reported, by regime."""

    source: str | None = None
    optimizer: str | None = None
    budget: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    loss: dict[str, float] | None = None
    sparsity: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] | None = None
    date: datetime.date | None = None
    packages: dict[str, str] | None = None


class Header(_Table):
    """The [profile] table.

    pattern       planner that the regimes' parameters are for
    mode          what mode = "auto" means
    block_size    tokens of a block, for queries and keys alike
    dense_layers  this many leading attention sites stay dense
    dense_steps   this many first denoising steps stay dense
    min_tokens    sites with fewer tokens stay dense; "auto" leaves the limit to the package
    """

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    pattern: Literal["dynamicrad", "radial", "adaspa", "lvsa", "dense"] = "dynamicrad"
    mode: Literal["static_ratio", "dynamic_threshold"] = "static_ratio"
    block_size: Literal[16, 32, 64, 128, 256] = 128
    dense_layers: Annotated[int, Field(ge=0)] = 0
    dense_steps: Annotated[int, Field(ge=0)] = 0
    min_tokens: int | Literal["auto"] = "auto"

    @field_validator("min_tokens", mode="plain")
    @classmethod
    def _auto_or_count(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise ValueError('expected "auto" or an integer of at least 0')


class Match(_Table):
    """The [match] table: the attentions that a profile was tuned for.

    models    names of model families, for people
    grid      [frames, height, width] in latent tokens
    heads     numbers of heads of the attentions
    head_dim  features of a head
    steps     denoising steps of a whole run
    layers    video self-attentions of the model
    """

    models: list[str] = []
    grid: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    heads: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    head_dim: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)] = 50
    layers: Annotated[int, Field(ge=1)]


class Profile(_Table):
    """A whole profile file. The keys of the [profile] table are also attributes of the profile."""

    schema_version: Literal[1] = Field(alias="schema")
    header: Header = Field(alias="profile")
    match: Match | None = None
    provenance: Provenance = Provenance()
    regimes: Regimes

    @property
    def name(self) -> str:
        """Name of the profile; a shipped file has the same."""
        return self.header.name

    @property
    def description(self) -> str:
        """One or two sentences on what the profile is for."""
        return self.header.description

    @property
    def pattern(self) -> str:
        """Planner that the parameters are for."""
        return self.header.pattern

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.header.block_size

    @property
    def dense_layers(self) -> int:
        """Leading attention sites that stay dense."""
        return self.header.dense_layers

    @property
    def mode(self) -> Literal["static_ratio", "dynamic_threshold"]:
        """What mode = "auto" means."""
        return self.header.mode

    @property
    def dense_steps(self) -> int:
        """First denoising steps that stay dense."""
        return self.header.dense_steps

    def whole_run_sparsity(self, mask_sparsity: float, steps: int | None = None, layers: int | None = None) -> float:
        """Share of a whole run's attention that is skipped, dense steps and layers counted, in 0..1.

        mask_sparsity is that of one sparse attention. `steps` and `layers` default to those of [match].
        Raises ProfileError where neither says them.
        """
        steps = steps or (self.match.steps if self.match else None)
        layers = layers or (self.match.layers if self.match else None)
        if steps is None or layers is None:
            raise ProfileError(f"profile {self.name!r} has no [match] table: give steps and layers.")
        sparse = max(0, steps - self.dense_steps) / steps * max(0, layers - self.dense_layers) / layers
        return mask_sparsity * sparse

    @property
    def min_tokens(self) -> int | Literal["auto"]:
        """Sites with fewer tokens stay dense."""
        return self.header.min_tokens

    def regime(self, name: str) -> Regime:
        """The parameters of "low", "mid" or "high" motion. Raises ProfileError for another name."""
        if name not in REGIMES:
            raise ProfileError(
                f"profile {self.name!r} has no regime {name!r}; expected one of {list(REGIMES)}."
                f"{nearest(str(name), REGIMES)}"
            )
        found: Regime = getattr(self.regimes, name)
        return found
