"""Pattern "dense": every block is read. To compare with, and to switch the rest off."""

from __future__ import annotations

import numpy as np

from ...profiles.parameters import Dense
from ..layout import Layout
from ..plan import BlockPlan
from .pattern import Pattern, plan_of_mask


def dense_plan(layout: Layout, parameters: Dense) -> BlockPlan:
    """The plan that keeps all blocks."""
    return plan_of_mask(np.ones((layout.num_rows, layout.num_blocks), dtype=bool), layout)


DENSE = Pattern("dense", Dense, dense_plan)
