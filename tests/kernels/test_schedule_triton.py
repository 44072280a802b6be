"""Heavy rows come first, the others keep their order; under Triton's interpreter and, where there is one, on CUDA."""

from __future__ import annotations

import pytest
import torch
from support.schedule_cases import CASES

pytest.importorskip("triton")


@pytest.mark.parametrize("name", CASES)
def test_interpreter(name: str, interpreter):
    (order,) = interpreter("schedule_cases", name)
    assert order.tolist() == CASES[name][1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str):
    from dynamicrad_compile.kernels.schedule_triton import heavy_first

    counts, order = CASES[name]
    assert heavy_first(torch.tensor(counts, dtype=torch.int32, device="cuda")[None, None]).tolist() == order
