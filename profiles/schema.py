"""Schema of a profile file, version 1.

    schema = 1

    [profile]            name, description, pattern, mode, block_size, dense_layers, dense_steps, min_tokens
    [match]              what the profile was tuned for; profile = "auto" picks by it
    [lvsa]               optional: parameters of pattern "lvsa", such as the frames that the model was trained for
    [adaspa]             optional: parameters of pattern "adaspa", such as the steps at which it searches
    [provenance]         where the numbers are from; every key is optional
    [regimes.low]        one table each for low, mid and high motion
    static_ratio = { sparsity = 0.85, decay_factor = 1.0, sink_frames = 1 }
    dynamic_threshold = { sparsity = 0.6, criterion = "threshold", near = 0.0, far = 0.5 }
    schedule = [[0.0, 0.0], [0.2, 0.85]]      optional: the sparsity of each stage of a run instead of the tables' own

Unknown keys are errors, types are not converted, and the models are frozen.
"""

from __future__ import annotations

import datetime
import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dynamicrad_compile.errors import ProfileError, nearest

from .parameters import (
    LVSA,
    REGIMES,
    AdaSpa,
    BlockSize,
    Count,
    DynamicThreshold,
    Mode,
    PatternName,
    Schedule,
    Share,
    StaticRatio,
    Table,
    checked_schedule,
)


class Regime(Table):
    """Parameters of one regime of motion, one table a mode.

    schedule  [[start, sparsity], ...] of the stages of a run, starts in shares of its steps; None: the tables' sparsity
    """

    static_ratio: StaticRatio
    dynamic_threshold: DynamicThreshold | None = None
    schedule: Schedule | None = None

    @field_validator("schedule", mode="plain")
    @classmethod
    def _stages(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("expected pairs [start, sparsity]")
        return checked_schedule(value)

    @property
    def tables(self) -> tuple[StaticRatio, ...]:
        """The tables that are there."""
        return (self.static_ratio, *([self.dynamic_threshold] if self.dynamic_threshold else []))


class Regimes(Table):
    """The three regimes of motion."""

    low: Regime
    mid: Regime
    high: Regime


class Provenance(Table):
    """Where the numbers are from. `sparsity` and `loss` are those the optimizer reported, by regime."""

    source: str | None = None
    optimizer: str | None = None
    budget: Count | None = None
    seed: int | None = None
    loss: dict[str, float] | None = None
    sparsity: dict[str, Share] | None = None
    date: datetime.date | None = None
    packages: dict[str, str] | None = None


class Header(Table):
    """The [profile] table.

    pattern       planner that the regimes' parameters are for
    mode          what mode = "auto" means; "auto": dynamic_threshold where the crossover table says that it pays
    block_size    tokens of a block, for queries and keys alike
    dense_layers  this many leading attention sites stay dense
    dense_steps   this many first denoising steps stay dense
    min_tokens    sites with fewer tokens stay dense; "auto" leaves the limit to the package
    """

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    pattern: PatternName = "dynamicrad"
    mode: Mode | Literal["auto"] = "static_ratio"
    block_size: BlockSize = 128
    dense_layers: Count = 0
    dense_steps: Count = 0
    min_tokens: int | Literal["auto"] = "auto"

    @field_validator("min_tokens", mode="plain")
    @classmethod
    def _auto_or_count(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise ValueError('expected "auto" or an integer of at least 0')


class Match(Table):
    """The [match] table: the attentions that a profile was tuned for.

    models    names of model families, for people
    grid      [frames, height, width] in latent tokens
    heads     numbers of heads of the attentions
    head_dim  features of a head
    steps     denoising steps of a whole run
    layers    video self-attentions of the model
    """

    models: list[str] = Field(default_factory=list)
    grid: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    heads: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    head_dim: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)] = 50
    layers: Annotated[int, Field(ge=1)]


class Profile(Table):
    """A whole profile file. The keys of the [profile] table are also attributes of the profile."""

    schema_version: Literal[1] = Field(alias="schema")
    header: Header = Field(alias="profile")
    match: Match | None = None
    lvsa: LVSA = LVSA()
    adaspa: AdaSpa = AdaSpa()
    provenance: Provenance = Provenance()
    regimes: Regimes

    @field_validator("lvsa")
    @classmethod
    def _of_all_steps(cls, value: LVSA) -> LVSA:
        if "step" in value.model_fields_set:
            raise ValueError("step is that of the run; leave it out")
        return value

    @model_validator(mode="after")
    def _boxes_are_blocks(self) -> Profile:
        for name in REGIMES:
            for table in getattr(self.regimes, name).tables:
                sizes = table.box_sizes
                if sizes is not None and math.prod(sizes) != self.header.block_size:
                    raise ValueError(
                        f"the box of regime {name!r}, {list(sizes)}, holds {math.prod(sizes)} tokens; expected those "
                        f"of a block, block_size = {self.header.block_size}"
                    )
        return self

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
    def mode(self) -> Literal["auto", "static_ratio", "dynamic_threshold"]:
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

    @property
    def is_scheduled(self) -> bool:
        """Whether the sparsity of a regime changes over a run."""
        return any(getattr(self.regimes, name).schedule for name in REGIMES)

    def regime(self, name: str) -> Regime:
        """The parameters of "low", "mid" or "high" motion. Raises ProfileError for another name."""
        if name not in REGIMES:
            raise ProfileError(
                f"profile {self.name!r} has no regime {name!r}; expected one of {list(REGIMES)}."
                f"{nearest(str(name), REGIMES)}"
            )
        found: Regime = getattr(self.regimes, name)
        return found
