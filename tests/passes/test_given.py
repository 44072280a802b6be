"""Queries and keys that are inputs of a graph: whose tokens they are is unknown; `grid` is believed where it fits."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, drad, masked_dense
from support.plain import PLAIN
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dynamicrad_compile.errors import StrictError

GRID = (5, 6, 8)
SPARSE = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0}


def attention(q, k, v):
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()


def compiled(**options):
    torch._dynamo.reset()
    return torch.compile(attention, backend="dynamicrad", options={**SPARSE, **options})


def tokens(*lengths):
    return [torch.randn(1, n, 2, 16) for n in lengths]


def test_whose_tokens_they_are_is_unknown():
    run = compiled()
    run(*tokens(240, 240, 240))
    (site,) = drad.report(run).sites
    assert (site.role, site.code, site.replaced) == ("unknown", "behind_graph_break", False)
    assert "are inputs of the graph" in site.reason
    with pytest.raises(StrictError, match="are inputs of the graph"):
        compiled(strict=True)(*tokens(240, 240, 240))


def test_other_lengths_are_cross_attention():
    run = compiled(grid=GRID)
    run(*tokens(240, 7, 7))
    (site,) = drad.report(run).sites
    assert (site.role, site.replaced) == ("cross_attention", False)


def test_the_advised_grid_is_believed_where_it_fits():
    q, k, v = tokens(240, 240, 240)
    run = compiled(grid=GRID, strict=True)
    sparse = run(q, k, v)
    assert [site.grid for site in drad.report(run).replaced] == [GRID]
    plan = drad.make_plan("dynamicrad", GRID, 16, sparsity=0.6, regime="mid", compensate=0.0, profile=PLAIN)
    with masked_dense(plan):
        torch.testing.assert_close(sparse, attention(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(5, 6, 9), (4, 6, 8)])
def test_a_grid_that_does_not_fit_is_an_error(grid):
    with pytest.raises(BackendCompilerFailed, match=r"does not fit the 240 video tokens"):
        compiled(grid=grid)(*tokens(240, 240, 240))


def test_a_grid_is_no_error_where_only_short_sequences_are_given():
    run = compiled(grid=GRID)
    run(*tokens(9, 9, 9))
    assert [site.replaced for site in drad.report(run).sites] == [False]
