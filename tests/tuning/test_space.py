"""The search space: its points meet the target, and the dynamic search starts at the static winner."""

from __future__ import annotations

import pytest
import torch
from support.tuning import task

from dynamicrad_compile.plans.cost import covariances, mean_keys
from dynamicrad_compile.tuning.boxes import shapes
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.space import DEFAULTS, Space
from dynamicrad_compile.tuning.task import MODES


@pytest.mark.parametrize("mode", MODES)
def test_points_of_the_space_meet_the_target(mode):
    chosen = task(grid=(8, 8, 8), sparsity=0.6)  # forced blocks and what stands for dropped ones take a third
    space, objective = Space(chosen, mode), Objective(chosen, "mid")
    generator = torch.Generator().manual_seed(0)
    points = [torch.rand(len(space.dimensions), generator=generator).tolist() for _ in range(8)]
    static = {**DEFAULTS, "sparsity": 0.6}
    for point in points + space.known_points(static):
        found = space.evaluate(objective, point)
        assert found.status == "ok"
        target = 0.6
        if found.parameters["covariance"]:  # drops what its covariances cost
            target += covariances(16, 512, 16, 16)
        assert target <= found.sparsity < target + 0.1
        assert found.loss == pytest.approx(1000 * found.error)
        again = objective.evaluate(mode, found.parameters)  # what a profile would hold
        assert (again.loss, again.sparsity) == (found.loss, found.sparsity)


def test_first_dynamic_point_is_the_static_winner():
    chosen = task(fixed={"sink_frames": 0}, seeds=(1,))
    objective = Objective(chosen, "high")
    static, dynamic = (Space(chosen, mode) for mode in MODES)
    winner = static.evaluate(objective, [0.3] * len(static.dimensions))
    first = dynamic.evaluate(objective, dynamic.known_points(winner.parameters)[0])
    assert first.error == pytest.approx(winner.error, rel=1e-6)
    assert winner.parameters["sink_frames"] == 0


def test_boxes_fit_the_grid():
    columns = [[1, 4, 4], [2, 2, 4], [4, 2, 2], [8, 1, 2], [16, 1, 1]]
    assert shapes((16, 8, 8), 16) == ["raster", *columns]
    assert shapes((11, 8, 8), 16) == ["raster", *columns[:4]]
    assert shapes((21, 30, 52), 128)[1:] == [[1, 8, 16], [2, 8, 8], [4, 4, 8], [8, 4, 4], [16, 2, 4]]
    assert shapes((200, 45, 80), 256)[-1] == [32, 2, 4]
    assert shapes((2, 2, 3), 16) == ["raster"]
    assert task(fixed={"box": (2, 2, 4)}).boxes == ([2, 2, 4],)
    assert task(boxes=("raster", (4, 2, 2))).boxes == ("raster", [4, 2, 2])
    assert task().boxes == ("raster", [1, 4, 4], [2, 2, 4], [4, 2, 2])


@pytest.mark.parametrize("mode", MODES)
def test_known_points_are_in_the_boxes_that_are_searched(mode):
    chosen = task(boxes=([4, 2, 2], [1, 4, 4]))
    values = [Space(chosen, mode)._decode(point) for point in Space(chosen, mode).known_points()]
    assert len(values) > 4
    assert {repr(value["box"]) for value in values} == {"[4, 2, 2]", "[1, 4, 4]"}


@pytest.mark.parametrize("mode", MODES)
def test_known_points_try_every_box_with_covariances(mode):
    chosen = task(grid=(16, 8, 8))
    space = Space(chosen, mode)
    values = [space._decode(point) for point in space.known_points(dict(DEFAULTS))]
    tried = [value["box"] for value in values if value["covariance"] and value.get("rank", "error") == "error"]
    assert {repr(box) for box in tried} == {repr(box) for box in shapes((16, 8, 8), 16)}
    assert all(not value["covariance"] or value["compensate"] for value in values)
    if mode == "dynamic_threshold":
        assert values[1]["candidates"] == 5.0  # of 0.2: all blocks


def test_what_is_fixed_is_not_searched():
    chosen = task(fixed={"box": (4, 2, 2), "rank": "error", "covariance": True, "criterion": "ratio"})
    static, dynamic = (Space(chosen, mode) for mode in MODES)
    assert not {"box", "covariance"} & set(static.dimensions)
    assert not {"box", "covariance", "rank", "criterion"} & set(dynamic.dimensions)
    assert "rank" not in static._decode([0.5] * len(static.dimensions))
    found = dynamic._decode([0.5] * len(dynamic.dimensions))
    assert (found["box"], found["rank"], found["covariance"]) == ([4, 2, 2], "error", True)


def test_compensation_dropped_reads_what_covariances_cost():
    chosen = task(grid=(8, 8, 8))
    table = {**DEFAULTS, "covariance": True, "sparsity": 0.9}
    found = Space(chosen, "static_ratio").without_compensation(table)
    assert found["compensate"] == 0.0
    assert not found["covariance"]
    assert found["sparsity"] == pytest.approx(0.9 - covariances(16, 512, 16, 16), abs=1e-6)
    kept = Space(task(fixed={"compensate": 0.5}), "static_ratio").without_compensation(table)
    assert kept["compensate"] == 0.5
    assert mean_keys(16, kept["compensate"]) > 0
