"""A task of the tuner that is small enough for tests."""

from __future__ import annotations

from dynamicrad_compile.tuning.task import Task

GRID = (5, 6, 7)
SMALL = dict(block_size=16, heads=2, head_dim=16, budget=10, seeds=(1, 2), rows=40)


def task(**changes):
    return Task(**{"grid": GRID, **SMALL, **changes})
