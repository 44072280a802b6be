"""The search space: points of the unit cube, what they mean, and points that are known to be sensible."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..kernels.select_criteria import CRITERIA
from ..plans.cost import mean_keys
from ..profiles.parameters import Prior, StaticRatio, limits
from .choosing import KEEP_ALL
from .objective import Evaluation, Objective, Parameters
from .task import Task

# Searched parameters of the prior: range, and "log", "linear" or "whole".
PRIOR: dict[str, tuple[float, float, str]] = {
    "decay_factor": (0.1, 100.0, "log"),
    "adjacent_width": (*limits(Prior, "adjacent_width"), "log"),
    "far_width": (*limits(Prior, "far_width"), "log"),
    "temporal_decay": (0.0, 6.0, "linear"),
    "thinning": (0.0, 6.0, "linear"),  # up to 2 it does nothing
    "sink_frames": (0, 2, "whole"),
    # Beyond its ends so that 0 and 1, which mean something, are met often.
    "compensate": (-0.25, 1.5, "linear"),
}
# dynamic_threshold: what the candidates keep, as a multiple of what is kept in the end, how that is shared between
# near and far blocks, and the criterion.
CHOICE: dict[str, tuple[float, float, str]] = {
    "candidates": (1.0, 5.0, "log"),
    "balance": (-2.0, 2.0, "linear"),
    "criterion": (0, len(CRITERIA) - 1, "whole"),
}
# Clipped to the planner's range after decoding.
CLIPPED = {"compensate": limits(StaticRatio, "compensate")}

DEFAULTS: Parameters = {**Prior().model_dump(), "compensate": 1.0}
# Where every static search begins: the prior's defaults with and without compensation, Radial Attention's bands
# (frequency reduction included), wide bands, the same place in many frames and in all, whole near frames, and these
# with the same place in all others.
KNOWN: list[Parameters] = [
    DEFAULTS,
    {**DEFAULTS, "compensate": 0.0},
    {**DEFAULTS, "thinning": 3.0},
    {**DEFAULTS, "decay_factor": 10.0},
    {**DEFAULTS, "temporal_decay": 1.0, "far_width": 0.1},
    {**DEFAULTS, "temporal_decay": 0.0, "far_width": 0.3, "compensate": 0.5},
    {**DEFAULTS, "decay_factor": 50.0, "temporal_decay": 5.0, "compensate": 0.0},
    {**DEFAULTS, "decay_factor": 10.0, "temporal_decay": 0.0, "far_width": 0.1, "compensate": 0.0},
]
# ... and every dynamic search: criterion, multiple of the candidates, balance, on the prior of the static winner.
KNOWN_CHOICES = [("ratio", 2.0, 0.0), ("mass", 2.5, 0.0), ("threshold", 2.5, 0.0), ("mass", 3.5, 1.0)]

Point = list[float]


class Space:
    """Points of one task and mode. A point is a list of numbers in 0..1, one for each searched dimension."""

    def __init__(self, task: Task, mode: str) -> None:
        self.task = task
        self.mode = mode
        dimensions = {**PRIOR, **CHOICE} if mode == "dynamic_threshold" else PRIOR
        self.dimensions = {name: span for name, span in dimensions.items() if name not in task.fixed}

    def known_points(self, static_winner: Parameters | None = None) -> list[Point]:
        """Where a search begins. The first dynamic point executes the static winner's plan."""
        if self.mode == "static_ratio":
            points = [self._encode(values) for values in KNOWN]
            return [point for index, point in enumerate(points) if point not in points[:index]]
        base = static_winner or DEFAULTS
        same = {**base, "candidates": 1.0, "balance": 0.0, "criterion": "ratio"}
        names = ("criterion", "candidates", "balance")
        others = [{**same, **dict(zip(names, choice, strict=True))} for choice in KNOWN_CHOICES]
        return [self._encode(values) for values in (same, *others)]

    def evaluate(self, objective: Objective, point: Point) -> Evaluation:
        """Decode a point and evaluate it. Numbers are rounded first, so a profile holds what was evaluated."""
        values = self._decode(point)
        balance = values.pop("balance", None)
        multiple = values.pop("candidates", 1.0)
        if multiple <= 1.001:
            # All candidates are kept: the static plan.
            parameters = self._plan_parameters(values, 1.0 - self.task.sparsity)
            if self.mode == "dynamic_threshold":
                parameters["near"], parameters["far"] = KEEP_ALL[parameters["criterion"]]
            return objective.evaluate(self.mode, parameters)
        paid = mean_keys(self.task.block_size, values["compensate"])
        keep = min(1.0, multiple * (1.0 - self.task.sparsity - paid) + paid)
        parameters = self._plan_parameters(values, keep)
        parameters |= dict(zip(("near", "far"), KEEP_ALL[parameters["criterion"]], strict=True))
        return objective.evaluate(self.mode, parameters, balance)

    def _plan_parameters(self, values: dict[str, Any], keep: float) -> Parameters:
        # One block more than the target skips, or rounding could leave the plan a block short of it.
        sparsity = min(1.0, max(0.0, 1.0 - keep + 1.0 / self.task.blocks**2))
        return {"sparsity": round(sparsity, 6), **values}

    def _decode(self, point: Point) -> dict[str, Any]:
        values: dict[str, Any] = {**DEFAULTS, **self.task.fixed}
        for (name, (low, high, kind)), u in zip(self.dimensions.items(), point, strict=True):
            u = min(1.0, max(0.0, float(u)))
            if kind == "log":
                value: Any = low * (high / low) ** u
            elif kind == "linear":
                value = low + (high - low) * u
            else:
                value = min(int(high), int(low + (high - low + 1) * u))
            if name in CLIPPED:
                value = min(CLIPPED[name][1], max(CLIPPED[name][0], value))
            if name == "criterion":
                value = CRITERIA[value]
            values[name] = float(f"{value:.4g}") if isinstance(value, float) else value
        return values

    def _encode(self, values: dict[str, Any]) -> Point:
        """The point of some values; those outside of the searched range go to its end."""
        point = []
        for name, (low, high, kind) in self.dimensions.items():
            value = CRITERIA.index(values[name]) if name == "criterion" else values[name]
            if kind == "log":
                u = math.log(value / low) / math.log(high / low)
            elif kind == "linear":
                u = (value - low) / (high - low)
            else:
                u = (value - low + 0.5) / (high - low + 1)
            point.append(float(np.clip(u, 0.0, 1.0)))
        return point
