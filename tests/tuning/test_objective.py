"""The objective: error, what compensation costs, the constraint, points that are pruned."""

from __future__ import annotations

import math

import pytest
from support.tuning import GRID, task

from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.space import DEFAULTS


def test_subsampled_error_is_near_the_whole():
    whole = Objective(task(rows=None), "mid").evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.7})
    few = Objective(task(rows=100), "mid").evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.7})
    assert few.error == pytest.approx(whole.error, rel=0.25)
    assert few.sparsity == whole.sparsity


def test_objective_counts_compensation_and_the_constraint():
    objective = Objective(task(proxies=("published",)), "mid")
    plain = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.7, "compensate": 0.0})
    plan = make_plan("dynamicrad", GRID, 16, **{**DEFAULTS, "sparsity": 0.7, "compensate": 0.4})
    paid = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.7, "compensate": 0.4})
    assert paid.sparsity == pytest.approx(plan.sparsity)
    assert plain.loss == pytest.approx(1000 * plain.error + 10000 * (0.8 - plain.sparsity))
    met = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.85})
    assert met.loss == 1000 * met.error
    assert [draw[:2] for draw in met.draws] == [("published", 1), ("published", 2)]


def test_invalid_points_are_pruned_with_a_reason():
    objective = Objective(task(), "low")
    found = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8, "decay_factor": 1e9})
    assert found.status == "pruned"
    assert "decay_factor must be in" in found.reason
    assert found.loss == math.inf
    with pytest.raises(KeyError):  # a defect is not an invalid point
        objective.evaluate("static_ratio", {"sparsity": 0.8})
