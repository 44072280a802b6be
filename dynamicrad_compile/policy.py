"""From options and profile to decisions: which plan each video self-attention of a graph gets, or why it stays dense.

    decide(sites, conditions, wishes) -> Decisions

Pure: no graph is read or changed here. What the options name (a profile, a router) is loaded by `Wishes.of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .errors import CrossoverError, PlanError
from .options import MIN_TOKENS_AUTO, Options
from .passes import Conditions, Control, Decisions, Dense, PlannedSite, VideoSite
from .plans import crossover
from .plans.own import OwnPlan
from .plans.table import PlanSpec, PlanTable, RegimeSpec, balance_of
from .profiles import REGIMES, Profile, load_profile, pick_profile
from .profiles.parameters import Mode, Radial, StaticRatio
from .reporting.reason import NOTHING, Reason
from .runtime import router
from .runtime.router import Router
from .runtime.state import RunState

SAFE_REGIME = REGIMES[router.SAFE_REGIME]
"""The regime that loses least where motion is not known: the one that keeps most blocks."""
CANDIDATE_FACTOR = 2.5
"""Candidates per kept block where a profile does not say how many candidates a selection is made from."""
AS_ASKED = f"{NOTHING}: the options ask for it"


@dataclass(frozen=True)
class Wishes:
    """Options, and what they name.

    profile  None: each site's grid picks one
    router   None: the regime is not routed
    own      the option plan; None: plans are made by pattern
    """

    options: Options
    profile: Profile | None
    router: Router | None
    own: OwnPlan | None = None

    @staticmethod
    def of(options: Options) -> Wishes:
        """Load profile and router. Raises ProfileError or RouterError."""
        profile = None if options.profile == "auto" else load_profile(options.profile)
        loaded = Router.load(options.router) if isinstance(options.router, str) else options.router
        own = None if options.plan is None else OwnPlan(options.plan, options.block_size, options.compensate)
        return Wishes(options, profile, loaded, own)


@dataclass(frozen=True)
class Settings:
    """Options where they are given, else the profile's; pattern "own" is the option plan."""

    profile: Profile
    pattern: str
    mode: Mode
    block_size: int
    dense_layers: int
    dense_steps: int
    min_tokens: int | Literal["auto"]

    @staticmethod
    def of(options: Options, profile: Profile) -> Settings:
        """What holds for the sites of this profile."""

        def chosen(name: str) -> Any:
            given = getattr(options, name)
            return getattr(profile, name) if given is None else given

        names = ("pattern", "block_size", "dense_layers", "dense_steps", "min_tokens")
        mode = profile.mode if options.mode == "auto" else options.mode
        values = {name: chosen(name) for name in names}
        if options.plan is not None and options.pattern != "dense":
            values["pattern"] = "own"
        return Settings(profile=profile, mode=mode, **values)


@dataclass(frozen=True)
class Regimes:
    """The regimes that a graph may be in, and why; unmet: the router that was given can't be used."""

    names: tuple[str, ...]
    why: str = ""
    unmet: bool = False


def decide(sites: Sequence[VideoSite], conditions: Conditions, wishes: Wishes) -> Decisions:
    """Decisions for the video self-attentions of one graph, in order."""
    notes: dict[str, None] = {}  # in order, each once
    unmet: dict[str, None] = {}
    regimes = _regimes(conditions, wishes)
    first: Settings | None = None if wishes.profile is None else Settings.of(wishes.options, wishes.profile)
    decided: list[PlannedSite | Dense] = []
    for number, site in enumerate(sites):
        profile, why = _profile_for(site, wishes)
        if why:
            notes[f"profile 'auto' is {profile.name!r}: {why}"] = None
        settings = Settings.of(wishes.options, profile)
        first = first or settings
        decision = _stays_dense(site, number, settings) or _planned(site, settings, wishes, regimes)
        if isinstance(decision, PlannedSite):
            ignored = _without_meaning(wishes.options, settings.pattern)
            if ignored:
                notes[ignored] = None
            if settings.pattern == "dynamicrad" and regimes.why:
                (unmet if regimes.unmet else notes)[regimes.why] = None
            dense, problem = _no_gain(decision, settings)
            if problem:
                unmet[problem] = None
            decision = dense or decision
        decided.append(decision)
    unused = [decision.reason for decision in decided if isinstance(decision, Dense) and not decision.asked]
    if wishes.own is not None and unused and not any(isinstance(decision, PlannedSite) for decision in decided):
        unmet[f"no attention of this graph uses the option plan. {unused[0]}"] = None
    control, problems = _control(sites, decided, conditions, first, wishes)
    return Decisions(decided, control, tuple(notes), (*unmet, *problems))


def _profile_for(site: VideoSite, wishes: Wishes) -> tuple[Profile, str]:
    """The profile of a site, and why it was picked; '' where it was asked for."""
    if wishes.profile is not None:
        return wishes.profile, ""
    return pick_profile(site.grid, heads=site.shape[1], head_dim=site.shape[-1])


def _stays_dense(site: VideoSite, number: int, settings: Settings) -> Dense | None:
    """Why a site gets no plan at all; number counts the video self-attentions of its graph."""
    if settings.pattern == "dense":
        return Dense(Reason("pattern_dense", "pattern is 'dense'", AS_ASKED), asked=True)
    if settings.dense_layers and not _is_one_layer(site):
        text = "dense_layers can't be honoured: one compiled block serves all layers; compile the whole model"
        advice = "compile the whole model with torch.compile(model), or set dense_layers=0"
        return Dense(Reason("dense_layers_unmet", text, advice))
    if number < settings.dense_layers:
        text = f"one of the first {settings.dense_layers} layers (dense_layers)"
        return Dense(Reason("dense_layers", text, AS_ASKED), asked=True)
    limit = settings.min_tokens
    if limit != "auto" and site.tokens < limit:
        return _few_tokens(site, limit)
    return None


def _few_tokens(site: VideoSite, limit: int) -> Dense:
    text = f"{site.tokens} tokens are fewer than min_tokens = {limit}: sparse attention would not pay"
    advice = "lower `min_tokens` to make it sparse all the same; it may be slower"
    return Dense(Reason("few_tokens", text, advice))


def _regimes(conditions: Conditions, wishes: Wishes) -> Regimes:
    """The regimes that a graph with these inputs may be in."""
    options, given = wishes.options, wishes.router
    if options.regime != "auto":
        return Regimes((options.regime,))
    why = ""
    if (options.state or RunState()).regimes is None:
        if given is None:
            why = "no motion router is given (option router; see fit_router)"
        elif conditions.prompt is None:
            why = "no prompt embedding was found among the inputs of this graph"
        elif conditions.embedding_dim != given.embedding_dim:
            found = conditions.embedding_dim
            why = f"the router is for embeddings of {given.embedding_dim} features, the prompt has {found}"
    if why:
        return Regimes((SAFE_REGIME,), f"regime 'auto' is {SAFE_REGIME!r}, the safe one: {why}", given is not None)
    chosen = "is pinned by the caller" if given is None else "is chosen by the router from the prompt"
    return Regimes(REGIMES, f"the regime (low, mid or high motion) {chosen}, each row its own")


def _without_meaning(options: Options, pattern: str) -> str:
    """Which options were given and mean nothing to the pattern; '' if none."""
    if pattern == "dynamicrad":
        return ""
    names = ["router", "sparsity"]
    names += ["compensate"] if pattern == "radial" else ["pattern", "decay_factor", "sink_frames"]
    given = [name for name in names if getattr(options, name) is not None]
    given += ["mode"] if options.mode == "dynamic_threshold" or (options.mode != "auto" and pattern == "own") else []
    given += ["regime"] if options.regime != "auto" and pattern == "own" else []
    by = "the option plan" if pattern == "own" else f"pattern {pattern!r}"
    return f"{by} has no meaning for {', '.join(given)}: not used" if given else ""


def _planned(site: VideoSite, settings: Settings, wishes: Wishes, regimes: Regimes) -> PlannedSite | Dense:
    """The plan of a site; where it is the option plan, perhaps why that is none. Raises PlanError as `_own`."""
    if settings.pattern == "own" and wishes.own is not None:
        return _own(site, wishes.own)
    if settings.pattern == "radial":
        spec = _radial(settings, wishes.options)
    else:
        spec = _dynamicrad(settings, wishes.options, regimes.names)
    return PlannedSite(site, spec.build(site.grid, *site.text), spec)


def _own(site: VideoSite, own: OwnPlan) -> PlannedSite | Dense:
    """The option plan, if it fits the site. Raises PlanError where a function fails or gives what does not fit."""
    try:
        table = own.table(site.grid, site.text, site.shape[1], site.device)
    except PlanError as error:
        if own.follows_grid:
            raise
        advice = "give a plan for this sequence, or a function (grid, text_before, text_after) that makes one"
        return Dense(Reason("plan_misfit", str(error), advice))
    if table is None:
        return Dense(Reason("plan_none", "the option plan gives None for its grid", AS_ASKED), asked=True)
    return PlannedSite(site, table)


def _radial(settings: Settings, options: Options) -> PlanSpec:
    sinks = settings.profile.regime(SAFE_REGIME).static_ratio.sink_frames
    parameters = Radial(**{"sink_frames": sinks, **_given(options, "decay_factor", "sink_frames")})
    return PlanSpec("radial", settings.block_size, (RegimeSpec("", parameters),))


def _dynamicrad(settings: Settings, options: Options, names: tuple[str, ...]) -> PlanSpec:
    make = _static if settings.mode == "static_ratio" else _dynamic
    regimes = tuple(make(settings.profile, name, options) for name in names)
    return PlanSpec("dynamicrad", settings.block_size, regimes)


def _static(profile: Profile, name: str, options: Options) -> RegimeSpec:
    return RegimeSpec(name, _override(profile.regime(name).static_ratio, options))


def _dynamic(profile: Profile, name: str, options: Options) -> RegimeSpec:
    """A regime whose blocks are chosen when the graph runs, among the candidates of the profile."""
    regime = profile.regime(name)
    table = regime.dynamic_threshold
    target = options.sparsity
    if table is None and target is None:
        target = regime.static_ratio.sparsity
    if target == 0.0:  # nothing to choose
        return _static(profile, name, options)
    parameters = _override(table or regime.static_ratio, options)
    if table is not None and target is None:
        return RegimeSpec(name, parameters, table.criterion, table.near, table.far)
    assert target is not None
    wide = max(0.0, 1.0 - CANDIDATE_FACTOR * (1.0 - target))
    parameters = parameters.changed(sparsity=wide if table is None else min(wide, table.sparsity))
    balance = 0.0 if table is None else balance_of(table.criterion, table.near, table.far)
    return RegimeSpec(name, parameters, "ratio", sparsity=target, balance=balance)


def _override(table: StaticRatio, options: Options) -> StaticRatio:
    return table.changed(**_given(options, "sparsity", "decay_factor", "sink_frames", "compensate"))


def _given(options: Options, *names: str) -> dict[str, Any]:
    """Those of the options that are not None."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _no_gain(planned: PlannedSite, settings: Settings) -> tuple[Dense | None, str]:
    """With min_tokens "auto": why sparse attention would not pay on this device, and why that can't be told."""
    if settings.min_tokens != "auto":
        return None, ""
    site = planned.video
    problem, gain, half = "", None, site.dtype != torch.float32
    tokens, sparsity = site.tokens, expected_sparsity(settings.profile, planned.spec, planned.table)
    arch = crossover.architecture(site.device)
    try:
        gain = crossover.expected_gain(arch, tokens, sparsity, site.shape[-1], half) if arch else None
    except CrossoverError as error:
        problem = f"min_tokens 'auto' is {MIN_TOKENS_AUTO}: {error}"
    if gain is None and tokens < MIN_TOKENS_AUTO:
        return _few_tokens(site, MIN_TOKENS_AUTO), problem
    if gain is not None and gain.ratio < crossover.MIN_GAIN:
        text = f"{tokens} tokens, {sparsity:.0%} sparse: expected {gain}, too little to pay"
        advice = "set `min_tokens=0` to make it sparse all the same; it would be slower by that table"
        return Dense(Reason("no_gain", text, advice)), problem
    return None, problem


def expected_sparsity(profile: Profile, spec: PlanSpec | None, table: PlanTable) -> float:
    """Share of dense attention that calls will skip: the mean over the regimes that the graph may be in.

    Where blocks are chosen by fixed thresholds it is not known before; the profile's static plan stands for it, since
    both modes of a profile are tuned to one sparsity.
    """
    plan, shares = table.plan, []
    if spec is None:
        return plan.sparsity
    for number, regime in enumerate(spec.regimes):
        if regime.criterion:
            static = profile.regime(regime.name).static_ratio.sparsity
            shares.append(static if regime.sparsity is None else regime.sparsity)
            continue
        own = slice(number, number + 1)
        weights = plan.compensate if len(plan.compensate) == 1 else plan.compensate[own]
        counts, indices = plan.kv_counts[own], plan.kv_indices[own]
        shares.append(replace(plan, kv_counts=counts, kv_indices=indices, compensate=weights).sparsity)
    return sum(shares) / len(shares)


def _control(
    sites: Sequence[VideoSite],
    decided: Sequence[PlannedSite | Dense],
    conditions: Conditions,
    settings: Settings | None,
    wishes: Wishes,
) -> tuple[Control, list[str]]:
    """What the graph decides when it runs, and which wishes that leaves unmet; settings: those of the first site."""
    if settings is None:  # there is no site
        return Control(), []
    options, problems = wishes.options, []
    specs = [decision.spec for decision in decided if isinstance(decision, PlannedSite) and decision.spec is not None]
    steps, timestep, refresh = settings.dense_steps, options.dense_timestep, options.refresh_steps or 0
    why_not = _no_refresh(sites, specs, settings) if refresh else ""
    if why_not:
        problems.append(f"refresh_steps = {refresh} {why_not}")
        refresh = 0
    asked = {"dense_steps": steps or None, "dense_timestep": timestep, "refresh_steps": refresh or None}
    wanted = ", ".join(f"{name} = {value}" for name, value in asked.items() if value is not None)
    kept = options.state or RunState()
    if wanted and conditions.timestep is None and kept.clock is None:
        problems.append(f"{wanted} can't be honoured: no timestep among the inputs of this graph; every step is sparse")
        steps, refresh, timestep = 0, 0, None
    routed = any(len(spec.regimes) > 1 for spec in specs)
    tensors, masked = None, False
    if routed and wishes.router is not None:
        tensors, masked = wishes.router.tensors(), wishes.router.masked
    return Control(tensors, masked, steps, timestep, refresh, kept.clock, kept.regimes), problems


def _no_refresh(sites: Sequence[VideoSite], specs: Sequence[PlanSpec], settings: Settings) -> str:
    """Why blocks can't be kept from step to step; '' if they can."""
    if settings.pattern == "own":
        return "has no meaning: the option plan gives the blocks"
    if settings.mode != "dynamic_threshold":
        return "has no meaning: mode is not dynamic_threshold"
    if any(len(spec.criteria) > 1 for spec in specs):
        return (
            "can't be honoured: the regimes choose by different criteria; fix one with the option regime, "
            "or give sparsity"
        )
    if not all(_is_one_layer(site) for site in sites):
        return "can't be honoured: one compiled block serves all layers; compile the whole model"
    return ""


def _is_one_layer(site: VideoSite) -> bool:
    """Whether a site belongs to one layer, as blocks.3.attn1; where one graph serves all layers there is no number."""
    return any(piece.isdigit() for piece in site.path.split("."))
