"""A task's mistakes are named."""

from __future__ import annotations

import pytest
from support.tuning import task

from dynamicrad_compile.errors import OptionsError

BAD_TASKS = {
    "grid": (dict(grid=(5, 6)), "grid must be"),
    "zero": (dict(grid=(5, 0, 6)), "each size of the grid"),
    "sparsity": (dict(sparsity=1.0), "between 0 and 1"),
    "proxy": (dict(proxies=("vidoe",)), "Did you mean 'video'"),
    "mode": (dict(modes=("dynamic_threshold",)), "static_ratio"),
    "budget": (dict(budget=3), "budget must be an integer of at least 10"),
    "fixed": (dict(fixed={"compensat": 0}), "Did you mean 'compensate'"),
    "box": (dict(fixed={"box": [2, 2, 2]}), "holds 8 tokens, expected those of a block, block_size = 16"),
    "box of two": (dict(fixed={"box": [4, 4]}), "box"),
    "boxes": (dict(boxes=([2, 2, 2],)), r"boxes: box \[2, 2, 2\] holds 8 tokens"),
    "no box": (dict(boxes=("rater",)), r"a box is \[frames, height, width\] in latent tokens or 'raster', got 'rater'"),
    "two ways": (dict(boxes=("raster",), fixed={"box": "raster"}), "not both"),
    "covariance": (dict(fixed={"covariance": 1}), "covariance"),
    "rank": (dict(fixed={"rank": "errors"}), "rank"),
    "seeds": (dict(seeds=()), "at least one integer"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TASKS.values(), ids=BAD_TASKS)
def test_bad_tasks(changes, message):
    with pytest.raises(OptionsError, match=message):
        task(**changes)
