"""Second moments of blocks on the CPU: equal to fp64 formulas, however far from zero the tokens are."""

from __future__ import annotations

import pytest
import torch
from support.pool_cases import CASES, MOMENTS, build, close

from dynamicrad_compile.kernels import pool_cpu
from dynamicrad_compile.kernels.pool_cpu import second_moments


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("dtype", "block", "masks", "offset"), CASES)
def test_matches_reference(dtype: str, block: int, masks: str, offset: float, moment: str):
    x, mask = build(dtype, masks, offset)
    close(second_moments(x, block, mask, moment), x, block, mask, moment)


@pytest.mark.parametrize("moment", MOMENTS)
def test_small_chunks_give_the_same(moment: str, monkeypatch: pytest.MonkeyPatch):
    x, mask = build("fp32", "mask", 5.0)
    expected = second_moments(x, 16, mask, moment)
    monkeypatch.setattr(pool_cpu, "CHUNK_BYTES", 1)
    assert torch.equal(second_moments(x, 16, mask, moment), expected)


def test_equal_tokens_do_not_vary():
    x = torch.full((1, 1, 37, 5), 0.1)
    assert not second_moments(x, 16, None, "variance").any()


def test_what_overflows_is_infinite():
    x = torch.tensor([1e30, -1e30, 1.0, 2.0]).view(1, 1, 4, 1)
    assert second_moments(x, 2, None, "variance").flatten().tolist() == [float("inf"), 0.25]
    assert second_moments(x, 2, None, "square").flatten().tolist() == [float("inf"), 2.5]


def test_hidden_tokens_are_not_read():
    x, mask = build("fp32", "mask", 0.0)
    expected = second_moments(x, 32, mask, "variance")
    x = x.masked_fill(~mask[:, None, :, None], float("nan"))
    assert torch.equal(second_moments(x, 32, mask, "variance"), expected)
