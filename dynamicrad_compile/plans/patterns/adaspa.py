"""Pattern "adaspa": the blocks that hold most of the attention, found by an exact search at few steps of a run.

Source: Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation" (AdaSpa, ICCV
2025), from its abstract; no code is published. Which blocks matter, and the log-sum-exp of each query, differ by input,
layer and head, but change little from one denoising step to the next. So

    steps 0 .. search_steps[0]   dense; the last of them gives each query's log-sum-exp, and has the first search
    a search                     A[I, J] = sum exp(scale q . k - lse) of all pairs of blocks, one product of queries
                                 and keys (`kernels.search_op`), with the log-sum-exp of the first search; the best
                                 blocks of each head within its budget are kept
    all other steps              read what was found

Nothing of that can be told from a grid alone. The plan here has what is read in any case: text, and a row's own block.
"""

from __future__ import annotations

import numpy as np

from ...profiles.parameters import AdaSpa
from ..layout import Layout
from ..plan import BlockPlan
from .pattern import Pattern, plan_of_mask


def always_read(layout: Layout, parameters: AdaSpa) -> BlockPlan:
    """The plan of the blocks that are read whatever a search finds."""
    mask = np.zeros((layout.num_rows, layout.num_blocks), dtype=bool)
    mask[np.arange(len(mask)), layout.own_blocks()] = True
    mask[layout.text_rows()] = True
    mask[:, layout.text_blocks()] = True
    return plan_of_mask(mask, layout, parameters.compensate, parameters.covariance)


ADASPA = Pattern("adaspa", AdaSpa, always_read, needs="search")
