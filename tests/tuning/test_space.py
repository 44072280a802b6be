"""The search space: its points meet the target, and the dynamic search starts at the static winner."""

from __future__ import annotations

import pytest
import torch
from support.tuning import task

from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.space import DEFAULTS, Space
from dynamicrad_compile.tuning.task import MODES


@pytest.mark.parametrize("mode", MODES)
def test_points_of_the_space_meet_the_target(mode):
    chosen = task(grid=(8, 8, 8), sparsity=0.65)  # forced blocks and compensation alone take a quarter
    space, objective = Space(chosen, mode), Objective(chosen, "mid")
    generator = torch.Generator().manual_seed(0)
    points = [torch.rand(len(space.dimensions), generator=generator).tolist() for _ in range(8)]
    static = {**DEFAULTS, "sparsity": 0.65}
    for point in points + space.known_points(static):
        found = space.evaluate(objective, point)
        assert found.status == "ok"
        assert 0.65 <= found.sparsity < 0.75
        again = objective.evaluate(mode, found.parameters)  # what a profile would hold
        assert (again.loss, again.sparsity) == (found.loss, found.sparsity)


def test_first_dynamic_point_is_the_static_winner():
    chosen = task(fixed={"sink_frames": 0})
    objective = Objective(chosen, "high")
    static, dynamic = (Space(chosen, mode) for mode in MODES)
    winner = static.evaluate(objective, [0.3] * len(static.dimensions))
    first = dynamic.evaluate(objective, dynamic.known_points(winner.parameters)[0])
    assert first.error == pytest.approx(winner.error, rel=1e-6)
    assert winner.parameters["sink_frames"] == 0
