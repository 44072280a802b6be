"""Every option of the backend: its meaning, default and range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import OptionsError, nearest

MIN_TOKENS_AUTO = 2048
"""Below this many tokens "auto" leaves attention dense: there is too little of it to win anything."""


class Options(BaseModel):
    """Options of `torch.compile(model, backend="dynamicrad", options={...})`.

    Build it with keyword arguments, or from the mapping given to torch.compile with `Options.from_mapping`.
    Raises OptionsError for an unknown name (with the nearest known one) or a value out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    profile: str | Path = "auto"
    """Name of a shipped profile, or the path of a TOML file; "auto" picks one."""

    pattern: Literal["dynamicrad", "radial", "dense"] | None = None
    """How blocks are chosen; None = the profile's. "dense" replaces nothing."""

    mode: Literal["auto", "static_ratio"] = "auto"
    """"static_ratio": a fixed share of blocks by the radial prior. "auto" takes the profile's (static_ratio)."""

    regime: Literal["auto", "low", "mid", "high"] = "auto"
    """Amount of motion that the plan is for; "auto" is "mid" until a router is fitted."""

    sparsity: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Share of blocks to skip; None = the profile's for the regime. Pattern "dynamicrad" only."""

    decay_factor: Annotated[float, Field(gt=0.0, le=1e3)] | None = None
    """Width of the radial windows; None = the profile's (pattern "radial": 1.0)."""

    sink_frames: Annotated[int, Field(ge=0)] | None = None
    """Leading frames that every query may read; None = the profile's."""

    grid: tuple[int, int, int] | None = None
    """(frames, height, width) of the video in latent tokens after patchifying; None = traced from the graph."""

    block_size: Literal[16, 32, 64, 128, 256] | None = None
    """Tokens of a query block and of a key block; None = the profile's."""

    dense_layers: Annotated[int, Field(ge=0)] | None = None
    """The first n video self-attentions of a graph stay dense; None = the profile's."""

    min_tokens: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """Attentions over fewer tokens stay dense; "auto" = 2048; None = the profile's."""

    strict: bool = False
    """Raise StrictError instead of leaving a video self-attention dense."""

    inner: str = "inductor"
    """torch.compile backend that compiles the rewritten graph ("inductor", "eager", "aot_eager", ...)."""

    inner_options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the inner backend: Inductor's options such as {"max_autotune": True}."""

    @field_validator("grid", mode="before")
    @classmethod
    def _three_positive(cls, value: Any) -> Any:
        if value is None:
            return None
        try:
            grid = tuple(int(n) for n in value)
        except (TypeError, ValueError):
            grid = ()
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError("expected three positive integers: (frames, height, width) in latent tokens")
        return grid

    @field_validator("sparsity", "decay_factor")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("expected a finite number")
        return value

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise OptionsError(_explain(error)) from None

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from what torch.compile was given. Raises OptionsError."""
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise OptionsError(f"options must be a dict of names and values, got {type(options).__name__}.")
        return cls(**{str(name): value for name, value in options.items()})


_LATER = {
    "dense_steps": "a step gate",
    "dense_timestep": "a step gate",
}


def _explain(error: ValidationError) -> str:
    """One line per problem: option, value, what is expected, nearest name."""
    lines = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else "options"
        if problem["type"] == "extra_forbidden":
            if name in _LATER:
                lines.append(f"option {name!r} needs {_LATER[name]}, which this version does not have; leave it out.")
            else:
                hint = nearest(name, Options.model_fields)
                lines.append(f"unknown option {name!r}.{hint} Known: {', '.join(Options.model_fields)}.")
            continue
        message = str(problem["msg"]).removeprefix("Value error, ")
        lines.append(f"option {name} = {problem['input']!r}: {message}.")
    return "\n".join(dict.fromkeys(lines))
