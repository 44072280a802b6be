"""Schedules: which sparsity each stage of a run has, from the option or from the profile's regimes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..options import Options
from ..plans.stages import Stages, stages_of
from ..profiles import Profile

NO_CLOCK = "no timestep is among the inputs of this graph. drad.compile(model, ...) notes it beside the graphs"

STEPS = 50
"""Denoising steps of a generation where neither option nor profile says how many."""


@dataclass(frozen=True)
class Scheduled:
    """Sparsities of each regime's stages.

    values   [regime][stage]: the sparsity; None: that of the profile's tables
    weights  of the stages in a run
    note     for the report; '' where sparsity does not change
    """

    stages: Stages
    values: tuple[tuple[float | None, ...], ...]
    weights: tuple[float, ...]
    note: str = ""


def schedule_of(options: Options, profile: Profile, names: Sequence[str], clocked: bool = True) -> Scheduled:
    """The stages of regimes of a profile; one where sparsity does not change over a run.

    clocked: the graph knows its step; if not, each regime has the mean of its stages all along.
    """
    given, by = options.sparsity, options.schedule_by
    if isinstance(given, tuple):
        wanted = dict.fromkeys(names, given)
    elif given is None:
        own = {name: profile.regime(name).schedule for name in names}
        wanted, by = {name: found for name, found in own.items() if found is not None}, "step"
    else:
        wanted = {}
    if not wanted:
        one = (given if isinstance(given, float) else None,)
        return Scheduled(Stages(), (one,) * len(names), (1.0,))
    starts = list(next(iter(wanted.values()))) if by == "timestep" else sorted({p for s in wanted.values() for p in s})
    points = list(dict.fromkeys(start for start, _ in starts))
    steps = options.steps or (profile.match.steps if profile.match else STEPS)
    stages, weights = stages_of(points, by, steps)
    values = tuple(
        tuple(_at(wanted[name], point, stages.falling) if name in wanted else None for point in points)
        for name in names
    )
    if not clocked:
        means = tuple((_mean(own, weights),) for own in values)
        return Scheduled(Stages(), means, (1.0,), f"sparsity is the schedule's mean at every step: {NO_CLOCK}")
    return Scheduled(stages, values, weights, _note(by, steps, options))


def _mean(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None


def _at(schedule: Sequence[tuple[float, float]], point: float, falling: bool) -> float:
    """The sparsity of a schedule at the beginning of a stage."""
    return [value for start, value in schedule if (start >= point if falling else start <= point)][-1]


def _note(by: str, steps: int, options: Options) -> str:
    if by == "timestep":
        return "sparsity changes over a run, by timestep"
    of = "" if options.steps else "; the option steps says how many there are"
    return f"sparsity changes over a run of {steps} steps{of}"
