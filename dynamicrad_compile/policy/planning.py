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
from ..plans.stages import Stages
from ..plans.table import PlanSpec, RegimeSpec
from ..profiles import Profile
from ..profiles.parameters import AdaSpa, DynamicThreshold, StaticRatio, Table
from ..reporting.reason import NOTHING, Reason
from .schedule import NO_CLOCK, schedule_of
from .settings import SAFE_REGIME, Regimes, Settings, Wishes

CANDIDATE_FACTOR = 2.5
"""Candidates per kept block where a profile does not say how many candidates a selection is made from."""

PLAN_OPTIONS = (
    *("compensate", "covariance", "box", "decay_factor", "sink_frames"),
    *("reference_frames", "window", "n_first", "sparsity_scale", "rule"),
    *("search_steps", "recall_threshold"),
)
"""Options that are parameters of patterns, beside sparsity, which may change over a run."""

SEARCH_ADVICE = (
    "compile the whole model, drad.compile(model, ...) where it falls into several graphs; or take another pattern"
)

AS_ASKED = f"{NOTHING}: the options ask for it"


def planned(site: VideoSite, settings: Settings, wishes: Wishes, regimes: Regimes) -> PlannedSite | Dense:
    """The plan of a site; where it is the option plan, perhaps why that is none. Raises PlanError as `_own`.

    Where several processes share an attention it is that of all; policy/share has what one of them needs.
    """
    if settings.pattern == "own" and wishes.own is not None:
        return _own(site, wishes.own)
    pattern = PATTERNS[settings.pattern]
    problem = too_long(site.keys, settings.block_size)
    if problem:
        return Dense(Reason("too_long", problem, "set a larger block_size"), this_grid=True)
    why_not = _no_search(site, regimes) if pattern.needs == "search" else ""
    if why_not:
        return Dense(Reason("no_search", f"pattern {pattern.name!r} {why_not}", SEARCH_ADVICE))
    spec = _specification(pattern, site, settings, wishes.options, regimes)
    return PlannedSite(site, spec.build(site.grid, *site.text, None if site.shard else site.queries), spec)


def _no_search(site: VideoSite, regimes: Regimes) -> str:
    """Why the blocks that a search finds can't be kept for later steps; '' if they can."""
    if not regimes.clocked:
        return f"searches at some steps of a run, and {NO_CLOCK}"
    if not site.path:  # called by no module: which layer it serves can't be told
        return "keeps what it finds for each layer, and one compiled function serves all layers"
    return ""


def _own(site: VideoSite, own: OwnPlan) -> PlannedSite | Dense:
    """The option plan, if it fits the site. Raises PlanError where a function fails or gives what does not fit."""
    frames = site.grid[0]
    if site.axes and frames < MIN_FRAMES:
        return Dense(few_frames(frames), this_grid=True)
    queries = None if site.shard else site.queries
    if queries is not None and not own.takes_queries:
        start, stop = queries
        text = f"only tokens {start}..{stop} of {site.keys} ask, of which the function of option plan is not told"
        advice = "give the function a parameter: (grid, text_before, text_after, queries=None)"
        return Dense(Reason("plan_without_queries", text, advice), this_grid=True)
    try:
        table = own.table(site.grid, site.text, site.all_heads, site.device, queries)
    except PlanError as error:
        if own.follows_grid:
            raise
        advice = "give a plan for this sequence, or a function (grid, text_before, text_after) that makes one"
        return Dense(Reason("plan_misfit", str(error), advice), this_grid=True)
    if table is None:
        reason = Reason("plan_none", "the option plan gives None for its grid", AS_ASKED)
        return Dense(reason, asked=True, this_grid=True)
    if site.shard and table.plan.order is not None:
        text = "the option plan has an order of tokens, and this process asks with some of them alone"
        return Dense(Reason("plan_order_of_shard", text, "give a plan in raster order, or shard heads"), this_grid=True)
    return PlannedSite(site, table)


def takes_regimes(pattern: str) -> bool:
    """Whether plans of a pattern, or the option plan ("own"), differ by regime."""
    return pattern in PATTERNS and PATTERNS[pattern].by_regime


def _specification(
    pattern: Pattern[Any], site: VideoSite, settings: Settings, options: Options, regimes: Regimes
) -> PlanSpec:
    if pattern.by_regime:
        make = _static if settings.mode == "static_ratio" else _dynamic
        found = schedule_of(options, settings.profile, regimes.names, regimes.clocked)
        rows = tuple(
            replace(make(settings.profile, name, options, value), weight=weight)
            for name, values in zip(regimes.names, found.values, strict=True)
            for value, weight in zip(values, found.weights, strict=True)
        )
        return PlanSpec(pattern.name, settings.block_size, rows, found.stages)
    parameters = _parameters(pattern, settings, options)
    size = settings.block_size
    if pattern.block_size is not None and options.block_size is None:
        size = pattern.block_size(site.grid, *site.text, size, parameters, site.queries)
    number = pattern.cycle(site.grid[0], parameters) if pattern.cycle is not None and regimes.clocked else 1
    steps = [parameters.model_copy(update={"step": step}) for step in range(number)] if number > 1 else [parameters]
    sparsity = parameters.sparsity if isinstance(parameters, AdaSpa) else None
    return PlanSpec(
        pattern.name, size, tuple(RegimeSpec("", step, sparsity=sparsity) for step in steps), Stages(number)
    )


def _parameters(pattern: Pattern[Any], settings: Settings, options: Options) -> Table:
    """Of a pattern that knows no regimes: the profile's, changed by the options."""
    known = pattern.parameters.model_fields
    own: Any = getattr(settings.profile, pattern.name, None)
    values = {} if own is None else own.model_dump()
    if "sink_frames" in known:
        values["sink_frames"] = settings.profile.regime(SAFE_REGIME).static_ratio.sink_frames
    if "search_steps" in known:
        if isinstance(options.sparsity, float):
            values["sparsity"] = options.sparsity
        if options.rank:
            values["rank"] = options.rank
    found: Table = pattern.parameters(**{**values, **_given(options, pattern.parameters)})
    return found


def pattern_notes(site: PlannedSite, settings: Settings, options: Options, regimes: Regimes) -> list[tuple[str, bool]]:
    """What is to be said of a pattern that knows no regimes, and whether a wish is unmet by that."""
    pattern, spec, found = PATTERNS.get(settings.pattern), site.spec, []
    if pattern is None or spec is None or pattern.by_regime:
        return []
    if pattern.needs == "step" and not regimes.clocked:
        found.append((f"pattern {pattern.name!r} reads the blocks of its first step at every step: {NO_CLOCK}", True))
    if isinstance(options.sparsity, tuple):
        found.append((f"pattern {pattern.name!r} has no schedule of sparsity: not used", True))
    if spec.block_size != settings.block_size:
        grid = "x".join(map(str, site.video.grid))
        text = f"pattern {pattern.name!r} has blocks of {spec.block_size} tokens over {grid}"
        found.append((f"{text}: larger ones would straddle too many frames", False))
    return found


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
    return table.changed(**given, **_given(options, StaticRatio))


def _given(options: Options, parameters: type[Table]) -> dict[str, Any]:
    """Those of PLAN_OPTIONS that are given and among the parameters."""
    values = {name: getattr(options, name) for name in PLAN_OPTIONS if name in parameters.model_fields}
    return {name: value for name, value in values.items() if value is not None}


def without_meaning(options: Options, pattern: str) -> str:
    """Which options were given and mean nothing to the pattern; '' if none."""
    own, routed = pattern == "own", takes_regimes(pattern)
    ranked = routed or pattern == "adaspa"
    taken = ("compensate", "covariance") if own else tuple(PATTERNS[pattern].parameters.model_fields)
    names = [name for name in ("sparsity", *PLAN_OPTIONS) if name not in taken]
    names = [*([] if routed else ["router"]), *([] if ranked else ["rank"]), *names, *(["pattern"] if own else [])]
    given = [name for name in names if getattr(options, name) is not None]
    if not routed:
        given += ["mode"] if options.mode == "dynamic_threshold" or (options.mode != "auto" and own) else []
        given += ["regime"] if options.regime != "auto" else []
    by = "the option plan" if own else f"pattern {pattern!r}"
    return f"{by} has no meaning for {', '.join(given)}: not used" if given else ""
