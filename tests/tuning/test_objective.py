"""The objective: error, what compensation costs, the constraint, points that are pruned."""

from __future__ import annotations

import math

import pytest
import torch
from support.tuning import GRID, task

from dynamicrad_compile.plans.cost import covariances
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.quality.blocks import masked_attention
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.proxy import video_proxy
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


@pytest.mark.parametrize("box", ["raster", [4, 2, 2], [1, 4, 4]], ids=str)
def test_a_point_is_judged_as_the_op_computes_it(box):
    """The whole error, covariances and all, against masked attention of the same draws in the plan's order."""
    chosen = task(rows=None, seeds=(3,), proxies=("video",))
    parameters = {**DEFAULTS, "sparsity": 0.7, "box": box, "covariance": True}
    found = Objective(chosen, "mid").evaluate("static_ratio", parameters)
    plan = make_plan("dynamicrad", GRID, 16, **parameters)
    q, k, v = video_proxy(GRID, "mid", 2, 16, 3)
    order = torch.arange(210) if plan.order is None else plan.order[0]
    blocks = (x[None, :, order].double() for x in (q, k, v))
    sparse = masked_attention(*blocks, plan.block_mask(), 16, 1.0, covariance=True)[0]
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, order]
    error = float((sparse - dense).square().mean() / (dense.var(correction=0) + 1e-6))
    assert found.error == pytest.approx(error, rel=1e-3)
    assert found.sparsity == pytest.approx(plan.sparsity)


def test_covariances_have_to_skip_what_they_cost():
    objective = Objective(task(grid=(8, 8, 8), sparsity=0.5, proxies=("published",)), "mid")
    cost = covariances(16, 512, 16, 16)
    for sparsity, lacking in ((0.5, cost), (0.8, 0.0)):
        found = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": sparsity, "covariance": True})
        assert found.sparsity == pytest.approx(sparsity, abs=0.01)
        target = 0.5 + cost if lacking else found.sparsity
        assert found.loss == pytest.approx(1000 * found.error + 10000 * (target - found.sparsity))
    plain = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.51})
    assert plain.loss == pytest.approx(1000 * plain.error)


def test_a_box_that_is_not_searched_is_pruned():
    found = Objective(task(), "low").evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8, "box": [16, 1, 1]})
    assert found.status == "pruned"
    assert "box must be among those searched, 'raster', [1, 4, 4]" in found.reason


def test_invalid_points_are_pruned_with_a_reason():
    objective = Objective(task(), "low")
    found = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8, "decay_factor": 1e9})
    assert found.status == "pruned"
    assert "decay_factor must be in" in found.reason
    assert found.loss == math.inf
    with pytest.raises(KeyError):  # a defect is not an invalid point
        objective.evaluate("static_ratio", {"sparsity": 0.8})
