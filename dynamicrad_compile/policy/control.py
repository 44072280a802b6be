"""What a graph decides when it runs: dense steps, regimes, when blocks are chosen anew."""

from __future__ import annotations

from collections.abc import Sequence

from ..passes import Conditions, Control, Dense, PlannedSite, VideoSite
from ..plans.table import PlanSpec
from .settings import Settings, Wishes


def control_of(
    sites: Sequence[VideoSite],
    decided: Sequence[PlannedSite | Dense],
    conditions: Conditions,
    settings: Settings | None,
    wishes: Wishes,
) -> tuple[Control, list[str]]:
    """What the graph decides when it runs, and which wishes that leaves unmet; settings: those of the first site."""
    if settings is None:  # there is no site
        return Control(), []
    options, problems, has_clock = wishes.options, [], wishes.call.clock is not None
    specs = [decision.spec for decision in decided if isinstance(decision, PlannedSite) and decision.spec is not None]
    steps, timestep, refresh = settings.dense_steps, options.dense_timestep, options.refresh_steps or 0
    why_not = _no_refresh(sites, specs, settings) if refresh else ""
    if why_not:
        problems.append(f"refresh_steps = {refresh} {why_not}")
        refresh = 0
    asked = {"dense_steps": steps or None, "dense_timestep": timestep, "refresh_steps": refresh or None}
    wanted = ", ".join(f"{name} = {value}" for name, value in asked.items() if value is not None)
    if wanted and conditions.timestep is None and not has_clock:
        text = "can't be honoured: no timestep among the inputs of this graph; every step is sparse"
        problems.append(f"{wanted} {text}. drad.compile(model, {wanted}) notes it beside the graphs")
        steps, refresh, timestep = 0, 0, None
    routed = any(spec.number_of_regimes > 1 for spec in specs)
    tensors, masked = None, False
    if routed and wishes.router is not None:
        tensors, masked = wishes.router.tensors(), wishes.router.masked
    return Control(tensors, masked, steps, timestep, refresh, has_clock, wishes.call.regimes is not None), problems


def _no_refresh(sites: Sequence[VideoSite], specs: Sequence[PlanSpec], settings: Settings) -> str:
    """Why blocks can't be kept from step to step; '' if they can."""
    if settings.pattern == "own":
        return "has no meaning: the option plan gives the blocks"
    if not any(spec.criteria for spec in specs):
        return "has no meaning: mode is not dynamic_threshold"
    if any(len(spec.criteria) > 1 for spec in specs):
        return (
            "can't be honoured: the regimes choose by different criteria; fix one with the option regime, "
            "or give sparsity"
        )
    if not all(site.path for site in sites):  # called by no module: which layer it serves can't be told
        return "can't be honoured: one compiled function serves all layers; compile the model"
    return ""
