"""RoPE in a loop over grids read from a tensor: one graph where these are known, else unknown without `grid`."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, call, drad, masked_dense, relative_error
from support.marks import slow
from support.plain import PLAIN
from torch import compile as torch_compile
from torch._dynamo.exc import BackendCompilerFailed
from zoo.models import _r
from zoo.original_breaks import BREAKS, Wan

from dynamicrad_compile.errors import StrictError

SPARSE = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0}


def plan_of(grid, after=0):
    given = {"sparsity": 0.6, "regime": "mid", "compensate": 0.0, "profile": PLAIN}
    return drad.make_plan("dynamicrad", grid, 16, text_after=after, **given)


def by_name(model, **options):
    return torch_compile(model, backend="dynamicrad", options={**SPARSE, **options})


def in_blocks(model, **options):
    for block in model.blocks:
        block.compile(backend="dynamicrad", options={**SPARSE, **options})
    return model


def with_drad(model, **options):
    return drad.compile(model, **{**SPARSE, **options})


HOW = [by_name, in_blocks, with_drad]
KNOWN = [(name, how) for name in ("wan_tolist", "wan_tolist_padded", "wan_items") for how in (by_name, with_drad)]
OPEN = [(name, how) for name in ("wan_disabled", "wan_wrapper") for how in HOW] + [("wan_tolist", in_blocks)]
QUICK = {("wan_tolist", by_name), ("wan_items", with_drad), ("wan_disabled", in_blocks), ("wan_wrapper", with_drad)}


def quick(cases):
    return [case if case in QUICK else slow(*case) for case in cases]


@pytest.mark.parametrize(("name", "how"), quick(KNOWN))
def test_numbers_that_are_put_into_a_tensor_and_read_back_break_nothing(name, how):
    """Each resolution has a graph of its own, with its own plan; as many tokens in another grid, too."""
    model, _, _ = BREAKS[name]()
    compiled = how(model, strict=True)
    resolutions = [(5, 6, 8), (5, 8, 6), (5, 6, 8), (6, 6, 8), (3, 10, 8)]
    for f, h, w in resolutions:
        _, kwargs, expected = BREAKS[name](f, h, w)
        sparse = call(compiled, kwargs)
        with masked_dense(plan_of((f, h, w), expected["n_text_after"])):
            assert relative_error(sparse, call(model, kwargs)) < 1e-5
        assert relative_error(sparse, call(model, kwargs)) > 1e-4
    report = drad.report(compiled)
    assert [site.replaced for site in report.sites] == [True, False] * 2 * 4
    assert {site.grid for site in report.replaced} == set(resolutions)
    assert len(report.graphs) == 4


def test_explain_sees_what_the_backend_will_and_leaves_it_so():
    model, kwargs, expected = BREAKS["wan_tolist"]()
    assert {site.grid for site in drad.explain(model, options=SPARSE, **kwargs).replaced} == {expected["grid"]}
    compiled, (_, kwargs, expected) = by_name(model), BREAKS["wan_tolist"](6, 4, 8)
    call(compiled, kwargs)
    assert [site.grid for site in drad.report(compiled).replaced] == [expected["grid"]] * 2


def test_two_samples():
    """The RoPE of each is its own; two grids in one batch stay dense, and right."""
    model, kwargs, _ = BREAKS["wan_tolist"](batch=2)
    compiled = by_name(model)
    sparse = call(compiled, kwargs)
    with masked_dense(plan_of((5, 6, 8))):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    kwargs["x"][1] = _r(4, 5, 16, 12)
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) < 1e-6
    assert "axes_disagree" in {site.code for site in drad.report(compiled).graphs[-1].sites}


class Turned(Wan):
    """Tokens are put in another order in front of the blocks, and back behind them."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.blocks[0].register_forward_pre_hook(self._turn)

    def _turn(self, block, given):
        return (self.order(given[0]), *given[1:])

    def unpatchify(self, x, grid_sizes):
        return super().unpatchify(self.order(x), grid_sizes)


def turned(first, second, sizes):
    return lambda x: x.unflatten(1, sizes).transpose(first, second).flatten(1, 3)


ORDERS = {
    "reversed": (lambda x: x.flip(1), (5, 6, 8)),
    "columns": (turned(2, 3, (5, 6, 8)), (5, 6, 8)),
    "columns of squares": (turned(2, 3, (5, 6, 6)), (5, 6, 6)),
    "columns of a cube": (turned(2, 3, (6, 6, 6)), (6, 6, 6)),
    "rows first": (turned(1, 2, (6, 6, 8)), (6, 6, 8)),
    "columns before frames": (turned(1, 3, (6, 8, 6)), (6, 8, 6)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_another_order_of_tokens_gets_no_plan(name):
    order, sizes = ORDERS[name]
    torch.manual_seed(0)
    model, (_, kwargs, _) = Turned(order).eval(), BREAKS["wan_tolist"](*sizes)
    compiled = by_name(model)
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) < 1e-6
    assert not drad.report(compiled).replaced


def test_other_backends_read_them_as_ever():
    """What is known stays known for this backend alone."""
    breaks = torch._dynamo.utils.counters["graph_break"]
    for backend in ("dynamicrad", "eager"):
        torch._dynamo.reset()
        breaks.clear()
        model, kwargs, _ = BREAKS["wan_tolist"]()
        call(torch_compile(model, backend=backend), kwargs)
        assert bool(breaks) == (backend == "eager")


@pytest.mark.parametrize(("name", "how"), quick(OPEN))
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
    with masked_dense(plan_of((5, 6, 8))):
        assert relative_error(sparse, call(eager, kwargs)) < 1e-5


@pytest.mark.parametrize("how", [by_name, slow(in_blocks), slow(with_drad)])
@pytest.mark.parametrize("batch", [1, 2])
def test_padding_behind_the_given_grid_is_read_by_all(how, batch):
    model, kwargs, expected = BREAKS["wan_disabled_padded"](batch=batch)
    (eager, _, _) = BREAKS["wan_disabled_padded"]()
    compiled = how(model, grid=expected["grid"], strict=True)
    sparse = call(compiled, kwargs)
    (site,) = drad.report(compiled).replaced
    assert (site.grid, tuple(site.text_tokens)) == (expected["grid"], (0, 16))
    with masked_dense(plan_of(expected["grid"], 16)):
        assert relative_error(sparse, call(eager, kwargs)) < 1e-5


def test_strict_raises():
    model, kwargs, _ = BREAKS["wan_disabled"]()
    with pytest.raises(StrictError, match="come from other graphs"):
        call(by_name(model, strict=True), kwargs)


def test_a_grid_that_does_not_fit_is_an_error():
    model, kwargs, _ = BREAKS["wan_disabled"]()
    with pytest.raises(BackendCompilerFailed, match=r"does not fit the 240 video tokens"):
        call(by_name(model, grid=(5, 6, 9)), kwargs)
