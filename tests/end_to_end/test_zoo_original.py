"""Models as the original repositories write them: equal to dense at full density, and to masked dense at any."""

from __future__ import annotations

import pytest
from support.replaced import check
from zoo.original_blocks import BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_dense_and_masked_dense(name):
    model, kwargs, expected = BLOCKS[name](batch=2)
    check(model, kwargs, expected)
