"""What a graph decides when it runs: dense steps, regimes, when blocks are chosen anew."""

from __future__ import annotations

from collections.abc import Sequence

from ..passes import Conditions, Control, Dense, PlannedSite, VideoSite
from ..plans.table import PlanSpec
from ..runtime.state import RunState
from .settings import Settings, Wishes, is_one_layer


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
    if not all(is_one_layer(site) for site in sites):
        return "can't be honoured: one compiled block serves all layers; compile the whole model"
    return ""
