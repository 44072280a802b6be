"""Schema of a profile file, version 1.

    schema = 1

    [profile]            name, description, pattern, block_size, dense_layers, min_tokens
    [provenance]         where the numbers are from; every key is optional
    [regimes.low]        one table each for low, mid and high motion
    static_ratio = { sparsity = 0.85, decay_factor = 1.0, sink_frames = 1 }

Unknown keys are errors, types are not converted, and the models are frozen.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dynamicrad_compile.errors import ProfileError, nearest

SCHEMA_VERSION = 1
REGIMES = ("low", "mid", "high")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StaticRatio(_Table):
    """Parameters of the static_ratio planner for one regime.

    sparsity      share of key/value blocks that a plan skips
    decay_factor  shape of the prior: larger spends more on wide neighbourhoods in near frames
    sink_frames   leading latent frames that count as adjacent to every frame
    """

    sparsity: Annotated[float, Field(ge=0.0, le=1.0)]
    decay_factor: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    sink_frames: Annotated[int, Field(ge=0)] = 1


class Regime(_Table):
    """Parameters of one regime of motion, one table a mode."""

    static_ratio: StaticRatio


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
    block_size    tokens of a block, for queries and keys alike
    dense_layers  this many leading attention sites stay dense
    min_tokens    sites with fewer tokens stay dense; "auto" leaves the limit to the package
    """

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    pattern: Literal["dynamicrad", "radial", "adaspa", "lvsa", "dense"] = "dynamicrad"
    block_size: Literal[16, 32, 64, 128, 256] = 128
    dense_layers: Annotated[int, Field(ge=0)] = 0
    min_tokens: int | Literal["auto"] = "auto"

    @field_validator("min_tokens", mode="plain")
    @classmethod
    def _auto_or_count(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise ValueError('expected "auto" or an integer of at least 0')


class Profile(_Table):
    """A whole profile file. The keys of the [profile] table are also attributes of the profile."""

    schema_version: Literal[1] = Field(alias="schema")
    header: Header = Field(alias="profile")
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
