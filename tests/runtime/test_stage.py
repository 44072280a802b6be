"""Stages of a run on the step clock, against plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch

from dynamicrad_compile.plans.stages import Stages, stages_of
from dynamicrad_compile.runtime import clock, stage


def run(stages, timesteps, calls=2):
    """(stage of each step, whether each call is the first of its stage)."""
    ticks = clock.new_clock()
    found, first = [], []
    for timestep in timesteps:
        for _ in range(calls):
            now = clock.advance(torch.tensor([timestep]), ticks)
            at = stage.stage_of(now, stages.number, stages.starts, stages.by, stages.falling)
            begins = stage.begins(now, stages.starts, stages.by, stages.falling)
            assert (at.shape, at.dtype, begins.shape) == ((1,), torch.int64, (1,))
            found.append(int(at))
            first.append(bool(begins))
    assert all(a == b for a, b in zip(found[::calls], found[calls - 1 :: calls], strict=True))
    return found[::calls], first


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 50])
@pytest.mark.parametrize("starts", [(0.0,), (0.0, 0.2), (0.0, 0.2, 0.5), (0.0, 0.1, 0.11, 0.9)])
def test_shares_of_steps(steps, starts):
    stages, weights = stages_of(starts, "step", steps)
    expected = [max(i for i, start in enumerate(starts) if start * steps <= n + 1e-9) for n in range(steps)]
    timesteps = [1000.0 - 10 * n for n in range(steps)]
    found, first = run(stages, timesteps * 2)
    assert found[:steps] == expected
    if steps > 1:
        assert found == expected * 2
    changes = [False, *(a != b for a, b in itertools.pairwise(expected))]
    assert first[: 2 * steps : 2] == changes
    assert not any(first[1::2])
    assert list(weights) == [expected.count(n) for n in range(len(starts))]


@pytest.mark.parametrize("falling", [True, False])
def test_timesteps(falling):
    starts = (1000.0, 800.0, 200.0) if falling else (-1.0, 0.2, 0.9)
    stages, weights = stages_of(starts, "timestep", 50)
    assert (stages.falling, weights) == (falling, (1.0, 1.0, 1.0))
    timesteps = [950.0, 800.0, 500.0, 200.0, 3.0] if falling else [0.0, 0.2, 0.5, 0.9, 1.0]
    found, first = run(stages, timesteps)
    assert found == [0, 1, 1, 2, 2]
    assert first[::2] == [False, True, False, True, False]


@pytest.mark.parametrize("number", [2, 3, 5])
def test_cycles(number):
    assert Stages(number).is_cycle
    found, _ = run(Stages(number), [100.0 - n for n in range(12)])
    assert found == [n % number for n in range(12)]


def test_plans_of_regimes_and_stages():
    regimes, at = torch.tensor([0, 2, 1]), torch.tensor([1])
    assert stage.row_of(regimes, at, 4).tolist() == [1, 9, 5]
    assert [bool(stage.is_stage(torch.tensor([n]), (0, 2))) for n in range(3)] == [True, False, True]
