"""The plan of a site, from settings, regimes and options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import PlanError
from ..options import Options
from ..passes import Dense, PlannedSite, VideoSite, few_frames
from ..plans.layout import MIN_FRAMES, too_long
from ..plans.own import OwnPlan
from ..plans.patterns import PATTERNS, Pattern
from ..plans.ratios import balance_of
from ..plans.table import PlanSpec, RegimeSpec
from ..profiles import Profile
from ..profiles.parameters import DynamicThreshold, StaticRatio
from ..reporting.reason import NOTHING, Reason
from .schedule import schedule_of
from .settings import SAFE_REGIME, Regimes, Settings, Wishes

CANDIDATE_FACTOR = 2.5
"""Candidates per kept block where a profile does not say how many candidates a selection is made from."""

PLAN_OPTIONS = ("compensate", "covariance", "box", "decay_factor", "sink_frames")
"""Options that are parameters of patterns, beside sparsity, which may change over a run."""

AS_ASKED = f"{NOTHING}: the options ask for it"


def planned(site: VideoSite, settings: Settings, wishes: Wishes, regimes: Regimes) -> PlannedSite | Dense:
    """The plan of a site; where it is the option plan, perhaps why that is none. Raises PlanError as `_own`."""
    if settings.pattern == "own" and wishes.own is not None:
        return _own(site, wishes.own)
    spec = _specification(PATTERNS[settings.pattern], settings, wishes.options, regimes)
    problem = too_long(site.keys, spec.block_size)
    if problem:
        return Dense(Reason("too_long", problem, "set a larger block_size"), this_grid=True)
    return PlannedSite(site, spec.build(site.grid, *site.text, site.queries), spec)


def _own(site: VideoSite, own: OwnPlan) -> PlannedSite | Dense:
    """The option plan, if it fits the site. Raises PlanError where a function fails or gives what does not fit."""
    frames = site.grid[0]
    if site.axes and frames < MIN_FRAMES:
        return Dense(few_frames(frames), this_grid=True)
    if site.queries is not None and not own.takes_queries:
        start, stop = site.queries
        text = f"only tokens {start}..{stop} of {site.keys} ask, of which the function of option plan is not told"
        advice = "give the function a parameter: (grid, text_before, text_after, queries=None)"
        return Dense(Reason("plan_without_queries", text, advice), this_grid=True)
    try:
        table = own.table(site.grid, site.text, site.shape[1], site.device, site.queries)
    except PlanError as error:
        if own.follows_grid:
            raise
        advice = "give a plan for this sequence, or a function (grid, text_before, text_after) that makes one"
        return Dense(Reason("plan_misfit", str(error), advice), this_grid=True)
    if table is None:
        reason = Reason("plan_none", "the option plan gives None for its grid", AS_ASKED)
        return Dense(reason, asked=True, this_grid=True)
    return PlannedSite(site, table)


def takes_regimes(pattern: str) -> bool:
    """Whether plans of a pattern, or the option plan ("own"), differ by regime."""
    return pattern in PATTERNS and PATTERNS[pattern].by_regime


def _specification(pattern: Pattern[Any], settings: Settings, options: Options, regimes: Regimes) -> PlanSpec:
    if pattern.by_regime:
        make = _static if settings.mode == "static_ratio" else _dynamic
        found = schedule_of(options, settings.profile, regimes.names, regimes.clocked)
        rows = tuple(
            replace(make(settings.profile, name, options, value), weight=weight)
            for name, values in zip(regimes.names, found.values, strict=True)
            for value, weight in zip(values, found.weights, strict=True)
        )
        return PlanSpec(pattern.name, settings.block_size, rows, found.stages)
    sinks = settings.profile.regime(SAFE_REGIME).static_ratio.sink_frames
    values = {"sink_frames": sinks, **_given(options, *PLAN_OPTIONS)}
    known = {name: values[name] for name in values if name in pattern.parameters.model_fields}
    return PlanSpec(pattern.name, settings.block_size, (RegimeSpec("", pattern.parameters(**known)),))


def _static(profile: Profile, name: str, options: Options, sparsity: float | None) -> RegimeSpec:
    """A regime whose blocks are known before; sparsity None: the profile's."""
    return RegimeSpec(name, _override(profile.regime(name).static_ratio, options, sparsity))


def _dynamic(profile: Profile, name: str, options: Options, sparsity: float | None) -> RegimeSpec:
    """A regime whose blocks are chosen when the graph runs, among the candidates of the profile."""
    regime = profile.regime(name)
    table = regime.dynamic_threshold
    parameters = _override(table or regime.static_ratio, options, sparsity)
    rank = options.rank or _rank(table, parameters)
    target = sparsity
    if target is None and (table is None or (rank, parameters.box) != (table.rank, table.box)):
        target = regime.static_ratio.sparsity  # the thresholds are for another choice
    if target == 0.0:  # nothing to choose
        return _static(profile, name, options, sparsity)
    if table is not None and target is None:
        return RegimeSpec(name, parameters, table.criterion, table.near, table.far, rank=table.rank)
    assert target is not None
    wide = 0.0 if rank == "error" else max(0.0, 1.0 - CANDIDATE_FACTOR * (1.0 - target))
    parameters = parameters.changed(sparsity=wide if table is None else min(wide, table.sparsity))
    balance = 0.0 if table is None else balance_of(table.criterion, table.near, table.far)
    return RegimeSpec(name, parameters, "ratio", sparsity=target, balance=balance, rank=rank)


def _rank(table: DynamicThreshold | None, parameters: StaticRatio) -> str:
    """What a profile chooses by; by error where it does not say.

    Where nothing stands for dropped blocks, there is no error of what stands for them: by mass.
    """
    if not parameters.compensate:
        return "mass"
    return "error" if table is None else table.rank


def _override(table: StaticRatio, options: Options, sparsity: float | None) -> StaticRatio:
    given = {} if sparsity is None else {"sparsity": sparsity}
    return table.changed(**given, **_given(options, *PLAN_OPTIONS))


def _given(options: Options, *names: str) -> dict[str, Any]:
    """Those of the options that are not None."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def without_meaning(options: Options, pattern: str) -> str:
    """Which options were given and mean nothing to the pattern; '' if none."""
    if takes_regimes(pattern):
        return ""
    own = pattern == "own"
    taken = ("compensate", "covariance") if own else tuple(PATTERNS[pattern].parameters.model_fields)
    parameters = ("sparsity", *PLAN_OPTIONS)
    names = ["router", "rank", *(name for name in parameters if name not in taken), *(["pattern"] if own else [])]
    given = [name for name in names if getattr(options, name) is not None]
    given += ["mode"] if options.mode == "dynamic_threshold" or (options.mode != "auto" and own) else []
    given += ["regime"] if options.regime != "auto" else []
    by = "the option plan" if own else f"pattern {pattern!r}"
    return f"{by} has no meaning for {', '.join(given)}: not used" if given else ""
