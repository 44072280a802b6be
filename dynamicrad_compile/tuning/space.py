"""The search space: points of the unit cube, what they mean, and points that are known to be sensible."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np

from ..kernels.select_criteria import CRITERIA
from ..plans.cost import mean_keys
from ..profiles.parameters import Prior, Rank, StaticRatio, limits
from .choosing import KEEP_ALL
from .objective import Evaluation, Objective, Parameters, extra
from .task import CHOICES, Task

# Searched parameters of the static plan: range, and "log", "linear" or "whole"; of those that are "listed" every task
# has its list (`Space.options`).
PRIOR: dict[str, tuple[float, float, str]] = {
    "decay_factor": (0.1, 100.0, "log"),
    "adjacent_width": (*limits(Prior, "adjacent_width"), "log"),
    "far_width": (*limits(Prior, "far_width"), "log"),
    "temporal_decay": (0.0, 6.0, "linear"),
    "thinning": (0.0, 6.0, "linear"),  # up to 2 it does nothing, and nothing for boxes
    "sink_frames": (0, 2, "whole"),
    # Beyond its ends so that 0 and 1, which mean something, are met often.
    "compensate": (-0.25, 1.5, "linear"),
    "covariance": (0, 1, "listed"),
    "box": (0, 1, "listed"),
}
# dynamic_threshold: what the candidates keep, as a multiple of what is kept in the end, how that is shared between
# near and far blocks, the criterion, and what it ranks by.
CHOICE: dict[str, tuple[float, float, str]] = {
    "candidates": (1.0, 5.0, "log"),
    "balance": (-2.0, 2.0, "linear"),
    "criterion": (0, 1, "listed"),
    "rank": (0, 1, "listed"),
}
# Clipped to the planner's range after decoding.
CLIPPED = {"compensate": limits(StaticRatio, "compensate")}

DEFAULTS: Parameters = {**Prior().model_dump(), "compensate": 1.0, "covariance": False, "box": "raster"}
# Where every static search begins: the prior's defaults with and without compensation, then with covariances and each
# box (`Space.known_points`); Radial Attention's bands (frequency reduction included), wide bands, the same place in
# many frames and in all, whole near frames, and these with the same place in all others.
FIRST: list[Parameters] = [DEFAULTS, {**DEFAULTS, "compensate": 0.0}]
KNOWN: list[Parameters] = [
    {**DEFAULTS, "thinning": 3.0},
    {**DEFAULTS, "decay_factor": 10.0},
    {**DEFAULTS, "temporal_decay": 1.0, "far_width": 0.1},
    {**DEFAULTS, "temporal_decay": 0.0, "far_width": 0.3, "compensate": 0.5},
    {**DEFAULTS, "decay_factor": 50.0, "temporal_decay": 5.0, "compensate": 0.0},
    {**DEFAULTS, "decay_factor": 10.0, "temporal_decay": 0.0, "far_width": 0.1, "compensate": 0.0},
]
# ... and every dynamic search, after the choice of all blocks by error, with covariances, in each box: criterion, rank,
# multiple of the candidates, balance, on the static winner.
KNOWN_CHOICES = [
    ("ratio", "mass", 2.0, 0.0),
    ("mass", "mass", 2.5, 0.0),
    ("threshold", "error", 2.5, 0.0),
    ("mass", "mass", 3.5, 1.0),
]

Point = list[float]


class Space:
    """Points of one task and mode. A point is a list of numbers in 0..1, one for each searched dimension.

    dimensions  range and kind of each
    options     what a listed dimension may be, in the order of its numbers
    fixed       what is not searched
    """

    def __init__(self, task: Task, mode: str) -> None:
        self.task = task
        self.mode = mode
        dynamic = mode == "dynamic_threshold"
        self.fixed = {name: value for name, value in task.fixed.items() if dynamic or name not in CHOICES}
        self.options: dict[str, tuple[Any, ...]] = {
            "covariance": (False, True),
            "box": task.boxes,
            "criterion": CRITERIA,
            "rank": get_args(Rank),
        }
        searched = {**PRIOR, **CHOICE} if dynamic else PRIOR
        self.dimensions = {
            name: (0, len(self.options[name]) - 1, "whole") if kind == "listed" else (low, high, kind)
            for name, (low, high, kind) in searched.items()
            if name not in self.fixed
        }

    def known_points(self, static_winner: Parameters | None = None) -> list[Point]:
        """Where a search begins. The first dynamic point executes the static winner's plan."""
        boxes = self.task.boxes
        home: Parameters = {"box": "raster"}
        if "raster" not in boxes:
            home = {"box": boxes[len(boxes) // 2], "covariance": True}
        columns_first = boxes[::-1]
        if self.mode == "static_ratio":
            boxed = [{**DEFAULTS, "covariance": True, "box": box} for box in columns_first]
            values = [*({**x, **home} for x in FIRST), *boxed, *({**x, **home} for x in KNOWN)]
        else:
            base = static_winner or {**DEFAULTS, **home}
            same = {**base, "criterion": "ratio", "rank": "mass", "candidates": 1.0, "balance": 0.0}
            by_error = {**same, "rank": "error", "candidates": CHOICE["candidates"][1], "covariance": True}
            boxed = [{**by_error, "box": box} for box in columns_first]
            names = ("criterion", "rank", "candidates", "balance")
            values = [same, by_error, *boxed, *({**same, **dict(zip(names, x, strict=True))} for x in KNOWN_CHOICES)]
        points = [self._encode(value) for value in values]
        return [point for index, point in enumerate(points) if point not in points[:index]]

    def evaluate(self, objective: Objective, point: Point) -> Evaluation:
        """Decode a point and evaluate it. Numbers are rounded first, so a profile holds what was evaluated."""
        values = self._decode(point)
        balance = values.pop("balance", None)
        multiple = values.pop("candidates", 1.0)
        if multiple <= 1.001:
            # All candidates are kept: the static plan.
            parameters = self._plan_parameters(values, 1.0 - self.task.sparsity - extra(self.task, values))
            if self.mode == "dynamic_threshold":
                parameters["near"], parameters["far"] = KEEP_ALL[parameters["criterion"]]
            return objective.evaluate(self.mode, parameters)
        if values["box"] != "raster":
            balance = 0.0  # all blocks are near
        paid = mean_keys(self.task.block_size, values["compensate"])
        kept = 1.0 - self.task.sparsity - paid - extra(self.task, values)
        parameters = self._plan_parameters(values, min(1.0, multiple * kept + paid))
        parameters |= dict(zip(("near", "far"), KEEP_ALL[parameters["criterion"]], strict=True))
        return objective.evaluate(self.mode, parameters, balance)

    def without_compensation(self, table: Parameters) -> Parameters:
        """A static table with nothing for dropped blocks: what their covariances cost is read instead."""
        values = {**table, "compensate": 0.0, "covariance": False} | self.fixed
        return values | {"sparsity": round(table["sparsity"] - extra(self.task, table) + extra(self.task, values), 6)}

    def _plan_parameters(self, values: dict[str, Any], keep: float) -> Parameters:
        # One block more than the target skips, or rounding could leave the plan a block short of it.
        sparsity = min(1.0, max(0.0, 1.0 - keep + 1.0 / self.task.blocks**2))
        return {"sparsity": round(sparsity, 6), **values}

    def _decode(self, point: Point) -> dict[str, Any]:
        values: dict[str, Any] = {**DEFAULTS, **self.fixed}
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
            if name in self.options:
                value = self.options[name][value]
            values[name] = float(f"{value:.4g}") if isinstance(value, float) else value
        if not values["compensate"] and "covariance" not in self.fixed:
            values["covariance"] = False  # nothing without compensation
        return values

    def _encode(self, values: dict[str, Any]) -> Point:
        """The point of some values; those outside of the searched range go to its end."""
        point = []
        for name, (low, high, kind) in self.dimensions.items():
            value = self.options[name].index(values[name]) if name in self.options else values[name]
            if kind == "log":
                u = math.log(value / low) / math.log(high / low)
            elif kind == "linear":
                u = (value - low) / (high - low)
            else:
                u = (value - low + 0.5) / (high - low + 1)
            point.append(float(np.clip(u, 0.0, 1.0)))
        return point
