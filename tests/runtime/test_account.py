"""The account of calls: what rows read, and what covariances add where they drop blocks."""

from __future__ import annotations

import pytest
import torch

from dynamicrad_compile.runtime.account import new_stats, record


@pytest.mark.parametrize(("counts", "share"), [([1, 1, 1, 1], 0.25 + 0.1), ([4, 4, 4, 4], 1.0), ([1, 1, 4, 4], 0.675)])
def test_covariances_are_counted_where_blocks_are_dropped(counts, share):
    stats = new_stats(torch.device("cpu"))
    rows = torch.tensor(counts, dtype=torch.int32).view(1, 1, 4)
    for _ in range(2):
        record(stats, rows, None, torch.zeros(1, 1, 4, 4, dtype=torch.int32), 4, 16, 0.1)
    assert stats.tolist() == pytest.approx([2 * share, 2.0])
