"""RoPE that runs outside the graphs, as in the original repositories: unknown without `grid`, exact with it."""

from __future__ import annotations

import pytest
from support.graphs import OPTIONS, call, drad, masked_dense, relative_error
from support.marks import slow
from support.plain import PLAIN
from torch import compile as torch_compile
from torch._dynamo.exc import BackendCompilerFailed
from zoo.original_breaks import BREAKS

from dynamicrad_compile.errors import StrictError

SPARSE = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0}
PLAN = drad.make_plan("dynamicrad", (5, 6, 8), 16, sparsity=0.6, regime="mid", compensate=0.0, profile=PLAIN)


def by_name(model, **options):
    return torch_compile(model, backend="dynamicrad", options={**SPARSE, **options})


def in_blocks(model, **options):
    for block in model.blocks:
        block.compile(backend="dynamicrad", options={**SPARSE, **options})
    return model


def with_drad(model, **options):
    return drad.compile(model, **{**SPARSE, **options})


HOW = [by_name, in_blocks, with_drad]
CASES = [(name, how) for name in ("wan_tolist", "wan_disabled", "wan_wrapper") for how in HOW]
QUICK = {("wan_tolist", by_name), ("wan_disabled", in_blocks), ("wan_wrapper", with_drad)}


@pytest.mark.parametrize(("name", "how"), [case if case in QUICK else slow(*case) for case in CASES])
def test_whose_tokens_they_are_is_unknown_and_the_grid_is_believed(name, how):
    model, kwargs, _ = BREAKS[name]()
    dense = call(model, kwargs)
    compiled = how(model)
    assert relative_error(call(compiled, kwargs), dense) < 1e-6
    given, cross = drad.report(compiled).sites
    assert (given.role, given.code, given.replaced) == ("unknown", "behind_graph_break", False)
    assert "set `grid`" in given.advice
    assert cross.role == "cross_attention"

    model, kwargs, expected = BREAKS[name]()
    compiled = how(model, grid=expected["grid"], strict=True)
    sparse, (eager, _, _) = call(compiled, kwargs), BREAKS[name]()
    assert [site.grid for site in drad.report(compiled).replaced] == [expected["grid"]]
    with masked_dense(PLAN):
        assert relative_error(sparse, call(eager, kwargs)) < 1e-5


def test_strict_raises():
    model, kwargs, _ = BREAKS["wan_tolist"]()
    with pytest.raises(StrictError, match="come from other graphs"):
        call(by_name(model, strict=True), kwargs)


@pytest.mark.parametrize(("name", "grid"), [("wan_disabled", (5, 6, 9)), ("wan_tolist_padded", (5, 6, 8))])
def test_a_grid_that_does_not_fit_is_an_error(name, grid):
    """Behind the video of the second there are 16 tokens of padding."""
    model, kwargs, _ = BREAKS[name]()
    with pytest.raises(BackendCompilerFailed, match=r"does not fit the (240|256) video tokens"):
        call(by_name(model, grid=grid), kwargs)
