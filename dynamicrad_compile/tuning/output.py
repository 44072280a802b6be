"""The profile file that a search writes."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from typing import Any

from ..profiles import REGIMES
from .search import Winners
from .task import Task

# dynamic_threshold is the profile's mode if its losses, held-out ones where there are any, are lower by this factor in
# the geometric mean of the regimes.
WORTH_SELECTING = 0.95
REACHED = 0.005  # a target is reached where so much is lacking: less than what other content selects
PACKAGES = ("dynamicrad-compile", "nevergrad", "torch", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def unreached(task: Task, winners: Winners) -> str:
    """Which winners skip less than the target, in words; '' if none does."""
    found = [
        f"{regime} {mode} {found.sparsity:.4f}"
        for (regime, mode), found in winners.tuned.items()
        if found.sparsity < task.sparsity - REACHED
    ]
    return f"target sparsity {task.sparsity:g} not reached: {', '.join(found)}" if found else ""


def better_mode(winners: Winners) -> str:
    """The mode that "auto" means: dynamic_threshold only where it is better by enough to pay for its selection."""
    judged = {**winners.tuned, **winners.held_out}
    ratios = [
        math.log(max(found.loss, 1e-9) / max(judged[regime, "static_ratio"].loss, 1e-9))
        for (regime, mode), found in judged.items()
        if mode == "dynamic_threshold"
    ]
    if ratios and math.exp(sum(ratios) / len(ratios)) < WORTH_SELECTING:
        return "dynamic_threshold"
    return "static_ratio"


def profile_tables(
    task: Task, winners: Winners, header: Mapping[str, Any], match: Mapping[str, Any] | None, source: str
) -> dict[str, Any]:
    """The content of the profile file. `header` goes to the [profile] table, `match` to the [match] table."""
    figures: dict[str, dict[str, float]] = {"loss": {}, "sparsity": {}}
    for stage, found in (("", winners.tuned), ("_held_out", winners.held_out)):
        for (regime, mode), evaluation in found.items():
            figures["loss"][f"{regime}_{mode}{stage}"] = round(evaluation.loss, 4)
            figures["sparsity"][f"{regime}_{mode}{stage}"] = round(evaluation.sparsity, 4)
    tables: dict[str, Any] = {
        "schema": 1,
        "profile": {"mode": better_mode(winners), "block_size": task.block_size, **header},
    }
    if match:
        tables["match"] = dict(match)
    tables["provenance"] = {
        "source": source,
        "optimizer": task.optimizer,
        "budget": task.budget,
        "seed": task.seed,
        "date": datetime.date.today(),
        **figures,
        "packages": package_versions(),
    }
    tables["regimes"] = {
        regime: {mode: winners.tuned[regime, mode].parameters for mode in task.modes} for regime in REGIMES
    }
    return tables
