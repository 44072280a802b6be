"""Padding behind a video whose grid is given: believed where the inputs' values show it, an error where they do not."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, drad, masked_dense, relative_error
from support.plain import PLAIN
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dynamicrad_compile.errors import GridError
from dynamicrad_compile.passes.reading.padding import rows_behind

GRID = (5, 6, 8)  # 240 tokens
PLAN = drad.make_plan("dynamicrad", GRID, 16, text_after=16, sparsity=0.6, regime="mid", compensate=0.0, profile=PLAIN)


def padded(tokens=240, rows=16, batch=2):
    video, row = torch.randn(batch, tokens, 2, 16), torch.randn(batch, 1, 2, 16)
    return torch.cat([video, row.expand(-1, rows, -1, -1)], 1)


def attention(q, k, v):
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)))


class Block(torch.nn.Module):
    """Tokens and, for each of them, a modulation; no table tells their grid."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x, e):
        return attention(*self.qkv(x.flatten(2) * (1 + e)).unflatten(-1, (3, 2, 16)).unbind(2))


def compiled(model):
    torch._dynamo.reset()
    options = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0, "grid": GRID}
    return torch.compile(model, backend="dynamicrad", options=options)


def check(model, *inputs):
    run = compiled(model)
    with torch.no_grad():
        sparse, dense = run(*inputs), model(*inputs)
        (site,) = drad.report(run).sites
        assert (site.grid, tuple(site.text_tokens), site.replaced) == (GRID, (0, 16), True)
        with masked_dense(PLAN):
            assert relative_error(sparse, model(*inputs)) < 1e-5
        assert relative_error(sparse, dense) > 1e-3


def test_queries_and_keys_from_another_graph():
    check(attention, *(padded() for _ in range(3)))


@pytest.mark.parametrize("noisy", [0, 239])
def test_tokens_of_a_block(noisy):
    """Modulation may be the same for padding and many tokens: it does not tell, and does not contradict."""
    e = torch.zeros(2, 256, 32)
    e[:, noisy:] = 0.5
    check(Block().eval(), padded(), e)


def shorter():
    """The second sample has fewer tokens than the grid."""
    x = padded()
    x[1, 200:] = x[1, -1:]
    return x


@pytest.mark.parametrize(
    "inputs",
    [
        [padded(256, 0) for _ in range(3)],
        [padded(), padded(256, 0), padded(256, 0)],
        [padded(241, 15) for _ in range(3)],
        [padded(239, 17) for _ in range(3)],
        [padded(240, 1) for _ in range(3)],
        [padded().flip(1) for _ in range(3)],
        [shorter() for _ in range(3)],
    ],
    ids=["none", "of queries alone", "too late", "too early", "one row", "in front", "another length"],
)
def test_nothing_else_is_padding(inputs):
    with pytest.raises(GridError, match=r"does not fit the (241|256) video tokens .* padding behind it"):
        compiled(attention)(*inputs)


def test_alike_modulation_alone_is_no_padding():
    """Clean frames in front of noisy ones: their tokens differ, whatever the modulation says."""
    e = torch.zeros(2, 256, 32)
    e[:, 240:] = 0.5
    with pytest.raises(GridError):
        compiled(Block().eval())(padded(256, 0), e)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_behind(dim):
    x = padded().movedim(1, dim)
    assert rows_behind(x, dim, 240) == (True, True)
    assert rows_behind(x, dim, 241) == (True, False)
    assert rows_behind(x, dim, 239)[0] is False
    assert rows_behind(x + 1e-6 * torch.randn_like(x), dim, 240) == (True, True)
