"""Counts of a plan's rows and the order in which heavy rows come first; also under Triton's interpreter."""

from __future__ import annotations

import torch

CASES = {
    "text_last": ([5, 6, 5, 6, 40, 40], [2, 4, 5, 0, 1, 2, 3]),
    "text_first": ([40, 5, 6, 5, 6], [1, 0, 1, 2, 3, 4]),
    "equal": ([7, 7, 7], [0, 0, 1, 2]),
    "all_dense": ([9] * 5, [0, 0, 1, 2, 3, 4]),
    "empty_rows": ([0, 0, 3, 0], [1, 2, 0, 1, 3]),
    "nothing": ([0, 0], [0, 0, 1]),
    "two": ([1, 9], [0, 0, 1]),  # 9 is not more than twice the mean of 5
}


def interpret(name: str) -> tuple[torch.Tensor, ...]:
    """The order of a case, from counts that are not contiguous and have two heads."""
    from dynamicrad_compile.kernels.schedule_triton import MAX_ROWS, heavy_first

    for rows in (1, MAX_ROWS + 1):
        assert heavy_first(torch.ones(1, 1, rows, dtype=torch.int32)) is None
    wide = torch.tensor(CASES[name][0], dtype=torch.int32).repeat(1, 2, 1)
    strided = torch.stack((wide, wide + 100), -1)[..., 0]
    return (heavy_first(strided),)
