"""Heavy rows come first, the others keep their order; under Triton's interpreter and, where there is one, on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

CASES = {
    "text_last": ([5, 6, 5, 6, 40, 40], [2, 4, 5, 0, 1, 2, 3]),
    "text_first": ([40, 5, 6, 5, 6], [1, 0, 1, 2, 3, 4]),
    "equal": ([7, 7, 7], [0, 0, 1, 2]),
    "all_dense": ([9] * 5, [0, 0, 1, 2, 3, 4]),
    "empty_rows": ([0, 0, 3, 0], [1, 2, 0, 1, 3]),
    "nothing": ([0, 0], [0, 0, 1]),
    "two": ([1, 9], [0, 0, 1]),  # 9 is not more than twice the mean of 5
}
SCRIPT = """
import torch, sys
from dynamicrad_compile.kernels.schedule_triton import MAX_ROWS, heavy_first
for counts in {counts}:
    wide = torch.tensor(counts, dtype=torch.int32).repeat(1, 2, 1)
    strided = torch.stack((wide, wide + 100), -1)[..., 0]
    print(heavy_first(strided).tolist())
print(heavy_first(torch.ones(1, 1, 1, dtype=torch.int32)))
print(heavy_first(torch.ones(1, 1, MAX_ROWS + 1, dtype=torch.int32)))
"""


def test_interpreter():
    script = SCRIPT.format(counts=[counts for counts, _ in CASES.values()])
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [*(str(order) for _, order in CASES.values()), "None", "None", ""]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str):
    from dynamicrad_compile.kernels.schedule_triton import heavy_first

    counts, order = CASES[name]
    assert heavy_first(torch.tensor(counts, dtype=torch.int32, device="cuda")[None, None]).tolist() == order
