"""Every option of the backend: its meaning, default and range."""

from __future__ import annotations

import importlib.metadata
import math
import numbers
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .beforehand import output_folder
from .errors import DynamicRadError, OptionsError, nearest
from .plans import own
from .problems import problems
from .profiles import load_profile
from .profiles.parameters import (
    BLOCK_SIZES,
    MODES,
    BlockSize,
    Count,
    DecayFactor,
    Mode,
    PatternName,
    Rank,
    RegimeName,
    Schedule,
    ScheduleBy,
    Share,
    checked_schedule,
    checked_steps,
)
from .runtime.router import Router

MIN_TOKENS_AUTO = 2048
"""Below this many tokens "auto" leaves attention dense where the crossover table has nothing for the device."""

INNER = "dynamicrad_compile.inner"
"""Entry points of inner compilers that know our operations, called with the rewritten graph, its inputs, inner_options
and a function that notes a text in the report; other names are looked up among the backends of torch.compile."""

KEYWORDS = ("model", "fullgraph", "dynamic", "backend", "name", "disable", "recompile_limit", "isolate_recompiles")
"""What torch.compile takes beside its options."""


class Options(BaseModel):
    """Options of `torch.compile(model, backend="dynamicrad", options={...})`.

    Build it with keyword arguments, or from the mapping given to torch.compile with `Options.from_mapping`.
    Raises OptionsError for an unknown name (with the nearest known one) or a value out of range, ProfileError or
    RouterError for a profile or a router that can't be loaded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    profile: str | Path = "auto"
    """Name of a shipped profile, or the path of a TOML file; "auto": the one tuned for the nearest grid, same heads."""

    pattern: PatternName | None = None
    """How blocks are chosen: "dynamicrad", the best by a prior within a budget; "radial", Radial Attention's static
    mask; "adaspa", an exact search at few steps; "lvsa", a window of frames, and frames that all read, rotating by
    step; "dense", all. None = the profile's."""

    plan: Any = None
    """Your own blocks instead of a pattern's: a BlockPlan, a bool block mask [M, M] or [heads, M, M], or a function
    (grid, text_before, text_after) that returns one of them (None: dense). Where only some of the tokens ask, masks are
    [rows, M], and the function needs a parameter `queries`, (start, stop). Where it does not fit, attention stays
    dense; an error of a function is raised. None = a pattern."""

    mode: Literal["auto", Mode] = "auto"
    """"static_ratio": a fixed share of blocks by the radial prior. "dynamic_threshold": the blocks that matter to the
    queries at hand, chosen among candidates of that prior at every call. "auto" takes the profile's, which may
    leave it to the number of tokens and the device."""

    regime: Literal["auto", RegimeName] = "auto"
    """Amount of motion that the plan is for; "auto": by the router from the prompt, "high" without one."""

    router: Any = None
    """Motion router: a `Router` of `fit_router`, or the path under which one was saved; None = no routing."""

    schedule_by: ScheduleBy = "step"
    """What the starts of a schedule of sparsity are: "step", shares of the steps of a generation, or "timestep", in the
    model's own units and in the order in which it sees them."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """Denoising steps of a generation, for a schedule by shares: a graph sees no more than the timestep at hand.
    None = those that the profile was tuned for, 50 where it does not say."""

    sparsity: Share | Schedule | None = None
    """Share of dense attention to skip, compensation counted; None = the profile's for the regime. In mode
    "dynamic_threshold" that share of the candidates is kept which meets it. Of patterns "dynamicrad" and "adaspa".
    A schedule, [(start, sparsity), ...], changes it in the course of a run (pattern "dynamicrad"):
    [(0.0, 0.0), (0.2, 0.6), (0.5, 0.9)] is dense in the first fifth of the steps, see `schedule_by` and `steps`."""

    compensate: Share | None = None
    """Weight of the mean key and value that stand for each dropped block; 0 = none, None = the profile's, with the
    option plan that plan's (0 for a mask)."""

    covariance: bool | None = None
    """With compensation: dropped blocks stand with their covariances too, not with their means alone
    (`kernels.moments_op`), for about 1 % of the products of dense attention. None = the profile's."""

    box: Literal["raster"] | tuple[int, int, int] | None = None
    """What a block is: a box of (frames, height, width) latent tokens, as many as block_size, or "raster": a run of
    tokens in raster order. Long in time where little moves, compact where much does. None = the profile's."""

    rank: Rank | None = None
    """What mode "dynamic_threshold" chooses blocks by: "mass", the attention that they hold, or "error", what would be
    wrong if their mean stood for them (`kernels.select_op`). None = the profile's."""

    qk_dtype: Literal["int8", "int8_dense"] | None = None
    """"int8": scores from queries and keys rounded to int8, about 1 % error, meant for GPUs; "int8_dense": only at
    dense steps, sparse ones stay exact; None = exact. Not measured on a GPU yet."""

    decay_factor: DecayFactor | None = None
    """Width of the radial windows; None = the profile's (pattern "radial": 1.0)."""

    sink_frames: Count | None = None
    """Leading frames that every query may read; None = the profile's."""

    reference_frames: Annotated[int, Field(ge=1)] | None = None
    """Pattern "lvsa": latent frames that the model was trained for; None = the profile's."""

    window: Count | None = None
    """Pattern "lvsa": frames on either side of a query's frame that are read; None = the profile's."""

    n_first: Count | None = None
    """Pattern "lvsa": leading frames that are read by all at every step; None = the profile's."""

    sparsity_scale: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    """Pattern "lvsa": reads so many times `reference_frames` frames; None = the profile's."""

    rule: Literal["published", "exact"] | None = None
    """Pattern "lvsa": frames as its published code counts them, or "exact": every frame reads as many as it should;
    None = the profile's."""

    search_steps: tuple[int, ...] | None = None
    """Pattern "adaspa": denoising steps, from 0, that search for the blocks that are then read; all is dense up to the
    first. None = the profile's."""

    recall_threshold: Annotated[float, Field(ge=0.0)] | None = None
    """Pattern "adaspa": heads that keep more than this share of their attention get sparser, as many of the worst get
    denser; 1 = all heads have one sparsity. None = the profile's."""

    grid: tuple[int, int, int] | None = None
    """(frames, height, width) of the video in latent tokens after patchifying; None = traced from the graph. One that
    the graph contradicts is an error."""

    override_grid: bool = False
    """`grid` counts even where the graph shows another one."""

    block_size: BlockSize | None = Field(default=None, validate_default=True)
    """Tokens of a query block and of a key block; None = the profile's, for a mask as option plan the one that fits."""

    dense_layers: Count | None = None
    """The first n video self-attentions of a graph stay dense; None = the profile's."""

    dense_steps: Count | None = None
    """The first n denoising steps of each generation stay dense; None = the profile's."""

    dense_timestep: float | None = None
    """Steps whose timestep is on the noisy side of this one stay dense, in the model's own units; None = none."""

    refresh_steps: Annotated[int, Field(ge=1)] | None = None
    """Mode "dynamic_threshold": choose blocks anew at every n-th step only and keep them in between; None = at every
    call. The blocks of all sites are then kept on the device."""

    min_tokens: Count | Literal["auto"] | None = None
    """Attentions over fewer tokens stay dense; "auto": those for whose length and sparsity the table of measured and
    estimated speed-ups expects no gain on this device (`crossover`); None = the profile's."""

    strict: bool = False
    """Raise StrictError instead of leaving a video self-attention dense."""

    inner: str = "inductor"
    """torch.compile backend that compiles the rewritten graph ("inductor", "tensorrt", "eager", "aot_eager", ...)."""

    inner_options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the inner backend: Inductor's options such as {"max_autotune": True}."""

    dump: Path | None = Field(default=None, validate_default=True)
    """Folder to write each captured graph into, before the passes and after each, with the attentions marked; made if
    it is not there. None = the environment variable DYNAMICRAD_DUMP, or nothing is written."""

    state: Any = Field(default=None, repr=False, exclude=True)
    """The clock and the regimes that drad.compile keeps outside the graphs; a `PinnedState` in training."""

    @field_validator("grid", "box", mode="before")
    @classmethod
    def _three_positive(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or (info.field_name == "box" and value == "raster"):
            return value
        try:
            given = () if isinstance(value, (str, bytes, Mapping, Set)) else tuple(value)
            grid = tuple(int(n) for n in given)
        except (TypeError, ValueError, OverflowError):
            given, grid = (), ()
        if len(grid) != 3 or min(grid) < 1 or grid != given or any(isinstance(n, bool) for n in given):
            or_raster = ', or "raster"' if info.field_name == "box" else ""
            raise ValueError(f"expected three positive integers: (frames, height, width) in latent tokens{or_raster}")
        return grid

    @field_validator("override_grid")
    @classmethod
    def _of_a_grid(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("grid", ()) is None:
            raise ValueError("there is no grid: give the one that is meant")
        return value

    @field_validator("block_size")
    @classmethod
    def _of_a_box(cls, value: int | None, info: ValidationInfo) -> int | None:
        box = info.data.get("box")
        if not isinstance(box, tuple):
            return value
        tokens = math.prod(box)
        if tokens not in BLOCK_SIZES:
            raise ValueError(f"box {box} holds {tokens} tokens; a box is one block, of {BLOCK_SIZES} tokens")
        if value not in (None, tokens):
            raise ValueError(f"box {box} holds {tokens} tokens; leave block_size out, or make it {tokens}")
        return tokens

    call_state: bool = Field(default=False, repr=False, exclude=True)
    """Clock and regimes are kept beside the graphs. Set by drad.compile, which does that, and by nobody else."""

    @field_validator("sparsity", mode="before")
    @classmethod
    def _schedule(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, (list, tuple)):
            return checked_schedule(value, info.data.get("schedule_by", "step"))
        return cls._number(value)

    @field_validator(
        "compensate",
        "decay_factor",
        "sink_frames",
        "block_size",
        "dense_layers",
        "dense_steps",
        "reference_frames",
        "window",
        "n_first",
        "sparsity_scale",
        "recall_threshold",
        "dense_timestep",
        "refresh_steps",
        "steps",
        "min_tokens",
        mode="before",
    )
    @classmethod
    def _number(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and value == "auto"):
            return value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError("expected a number")
        if not math.isfinite(value):
            raise ValueError("expected a finite number")
        return value

    @field_validator("search_steps", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        return None if value is None else checked_steps(value)

    @field_validator("inner")
    @classmethod
    def _known_inner(cls, value: str) -> str:
        if value == "dynamicrad":
            raise ValueError("this would call itself; use 'inductor' or another backend")
        if value != "inductor":
            ours = [entry.name for entry in importlib.metadata.entry_points(group=INNER)]
            if value not in {*ours, *torch._dynamo.list_backends(exclude_tags=())}:
                known = sorted({*ours, *torch._dynamo.list_backends()} - {"dynamicrad"})
                hint = nearest(value, known)
                raise ValueError(f"no backend of torch.compile has this name.{hint} Known: {', '.join(known)}")
        return value

    @field_validator("inner_options")
    @classmethod
    def _known_to_inductor(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("inner") == "inductor":
            known = torch._inductor.list_options()
            for name in value:
                if name not in known:
                    raise ValueError(f"Inductor has no option {name!r}.{nearest(name, known)}")
        return value

    @field_validator("router", mode="before")
    @classmethod
    def _path_or_router(cls, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if value is None or isinstance(value, str) or hasattr(value, "embedding_dim"):
            return value
        raise ValueError("expected a path, or a Router of fit_router or Router.load")

    @field_validator("dump")
    @classmethod
    def _writable(cls, value: Path | None) -> Path | None:
        folder = value or os.environ.get("DYNAMICRAD_DUMP")
        if not folder:
            return None
        try:
            return output_folder(folder)  # made when there is something to write
        except DynamicRadError as error:
            raise ValueError(f"expected a folder to write graphs into: {error}") from None

    @field_validator("plan", mode="before")
    @classmethod
    def _own_plan(cls, value: Any) -> Any:
        return None if value is None else own.checked(value)

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise OptionsError("\n".join(problems(error, Options, "option", _other_place))) from None
        if self.profile != "auto":
            load_profile(self.profile)
        if isinstance(self.router, str):
            Router.load(self.router)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from what torch.compile was given. Raises OptionsError."""
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise OptionsError(f"options must be a dict of names and values, got {type(options).__name__}.")
        return cls(**{str(name): value for name, value in options.items()})


def _other_place(name: str) -> str:
    """Where a name belongs that is no option of ours, else an empty string."""
    if name in KEYWORDS:
        return f" It is a keyword of torch.compile: torch.compile(model, {name}=...)."
    if name in torch._inductor.list_options():
        return f" It is Inductor's: put it into inner_options, as {{'inner_options': {{{name!r}: ...}}}}."
    return ""


def mode_options(mode: str | None, inner: str) -> dict[str, Any]:
    """Inductor's options for torch.compile's `mode`. Raises OptionsError for an unknown one, or another backend."""
    if mode is None:
        return {}
    known = torch._inductor.list_mode_options()
    if mode not in known:
        ours = ("auto", *MODES)
        hint = nearest(str(mode), [*known, *ours])
        listed = ", ".join(known)
        raise OptionsError(
            f"unknown mode {mode!r}.{hint} torch.compile's are {listed}; the option mode is {' or '.join(ours)}."
        )
    if inner != "inductor":
        raise OptionsError(f"mode={mode!r} is for Inductor, but inner={inner!r}; leave `mode` out.")
    return dict(known[mode])
