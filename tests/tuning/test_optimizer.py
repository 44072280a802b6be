"""The optimizer is deterministic and found by name."""

from __future__ import annotations

import math

import pytest

from dynamicrad_compile.errors import OptionsError
from dynamicrad_compile.tuning.optimizer import Optimizer


def test_optimizer_is_deterministic_and_named():
    def points(seed):
        optimizer = Optimizer("TwoPointsDE", 3, 12, seed, 1, [[0.1, 0.2, 0.3]])
        found = []
        for number in range(6):
            candidate, point = optimizer.ask()
            optimizer.tell(candidate, math.inf if number == 1 else 1.0 + sum(point))
            found.append(point)
        return found

    assert points(0)[0] == pytest.approx([0.1, 0.2, 0.3])
    assert points(0) == points(0) != points(1)
    assert all(0.0 <= u <= 1.0 for point in points(0) for u in point)
    with pytest.raises(OptionsError, match="Did you mean 'TwoPointsDE'"):
        Optimizer("TwoPointDE", 3, 12, 0, 1, [])
