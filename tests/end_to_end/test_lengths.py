"""Calls of different sizes, in any order: each gets its own plan or dense attention, in as few graphs as Dynamo makes.

A case is a list of calls; its letters say whether each call's output equals dense attention (d) or not (s).
"""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, call, make, masked_dense, relative_error
from support.marks import slow
from support.plain import PLAIN
from zoo.models import ZOO
from zoo.more import ZOO_MORE

import dynamicrad_compile as drad

MIN = {"min_tokens": 400}


def frames(*numbers):
    return [{"f": number} for number in numbers]


def compiled_wan(how, options, dynamic=None):
    model, _, _ = make("wan_t2v")
    options = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0, **options}
    if how == "whole":
        return torch.compile(model, backend="dynamicrad", fullgraph=True, dynamic=dynamic, options=options)
    model.compile_repeated_blocks(backend="dynamicrad", fullgraph=True, dynamic=dynamic, options=options)
    return model


def check(how, calls, letters, graphs, dynamic=None, mark=(), **options):
    compiled = compiled_wan(how, options, dynamic)
    eager, _, _ = make("wan_t2v")
    found = ""
    for sizes in calls:
        _, kwargs, _ = make("wan_t2v", **sizes)
        for dim in mark:
            torch._dynamo.mark_dynamic(kwargs["hidden_states"], dim)
        found += "d" if relative_error(call(compiled, kwargs), call(eager, kwargs)) < 1e-5 else "s"
    assert found == letters
    assert len(drad.report(compiled).graphs) == graphs


ORDERS = {
    "one_frame_second": (frames(5, 1, 6, 5), "sdss", {"whole": 3, "regional": 2}),
    "two_frames_second": (frames(5, 2, 6, 5, 2), "sdssd", {"whole": 2, "regional": 2}),
    "one_frame_first": (frames(1, 5, 6, 5), "dsss", {"whole": 2, "regional": 2}),
    "few_frames_first": (frames(2, 1, 6, 5), "ddss", {"whole": 3, "regional": 3}),
    "small_frame_second": ([*frames(5), {"f": 1, "h": 2, "w": 2}, *frames(6)], "sds", {"whole": 3, "regional": 2}),
}


@pytest.mark.parametrize("how", ["regional", slow("whole")])
@pytest.mark.parametrize("order", [case if case.startswith("one") else slow(case) for case in ORDERS])
def test_any_order_of_lengths(how, order):
    calls, letters, graphs = ORDERS[order]
    check(how, calls, letters, graphs[how])


@pytest.mark.parametrize(
    ("orders", "letters", "graphs"), [((1, 5, 6), "dss", 2), slow((1, 2, 1, 6), "ddds", 2)], ids=str
)
@pytest.mark.slow
def test_a_dynamic_regional_graph_that_first_sees_a_single_frame(orders, letters, graphs):
    """Nothing tells that it is no image: that graph is for it alone."""
    check("regional", frames(*orders), letters, graphs, dynamic=True)


@pytest.mark.slow
def test_single_frames_of_other_sizes_before_a_video():
    check("regional", [{"f": 1, "h": 4}, {"f": 1, "h": 5}, *frames(5, 6)], "ddss", 3)


@pytest.mark.parametrize("how", [slow("whole"), slow("regional")])
@pytest.mark.parametrize("name", ["neg_flux", "neg_flux3", "neg_hunyuan_image"])
def test_image_models_stay_dense_at_any_number_of_resolutions(name, how):
    build = {**ZOO, **ZOO_MORE}[name]
    model = build()[0]
    if how == "whole":
        compiled = torch.compile(model, backend="dynamicrad", options=OPTIONS)
    else:
        compiled = model
        compiled.compile_repeated_blocks(backend="dynamicrad", options=OPTIONS)
    for h, w in ((12, 10), (14, 10), (16, 12), (10, 16), (8, 6), (20, 10)):
        call(compiled, build(h=h, w=w)[1])
    assert not drad.report(compiled).replaced


def test_regional_compilation_serves_many_lengths_with_two_graphs():
    check("regional", frames(5, 6, 7, 8, 9, 10, 11, 12, 13, 14), "s" * 10, 2)


@pytest.mark.parametrize("how", ["whole", slow("regional")])
@pytest.mark.slow
def test_a_dynamic_graph_that_first_sees_few_frames(how):
    check(how, frames(2, 5, 6, 2), "dssd", 1, dynamic=True)


@pytest.mark.slow
def test_marked_frames_may_be_few():
    check("whole", frames(2, 6, 2, 9), "dsds", 1, mark=(2,))


@pytest.mark.parametrize("how", ["regional", slow("whole")])
def test_min_tokens_holds_for_each_length(how):
    """Stock Dynamo makes two graphs; lengths on the other side of the limit get one more."""
    check(how, frames(5, 10, 6, 4, 12, 7, 9), "dsddsds", 3, **MIN)


@pytest.mark.parametrize("how", [slow("whole"), slow("regional")])
def test_min_tokens_holds_after_a_long_video(how):
    check(how, frames(10, 12, 6, 4, 12), "ssdds", 3, **MIN)


@pytest.mark.parametrize(
    "options", [{"mode": "dynamic_threshold"}, slow({"pattern": "radial", "sparsity": None})], ids=str
)
@pytest.mark.slow
def test_other_plans_follow_the_table_too(options):
    options = {"compensate": None, **options} if "pattern" in options else options
    options = {**options, "regime": "auto"} if "pattern" in options else options
    check("regional", frames(5, 1, 9), "sds", 2, **options)


@pytest.mark.parametrize("name", ["wan_t2v", slow("hunyuan_video"), slow("ltx"), slow("kandinsky5")])
def test_each_grid_of_a_regional_graph_gets_its_own_plan(name):
    """Grids of as many tokens never share a plan, also in a graph that is for any number of tokens."""
    model, eager = make(name)[0], make(name)[0]
    model.compile_repeated_blocks(backend="dynamicrad", options={**OPTIONS, "sparsity": 0.6})
    for grid in [(5, 6, 8), (4, 6, 8), (3, 8, 8), (6, 4, 8), (3, 4, 16), (4, 6, 8)]:
        _, kwargs, expected = make(name, **dict(zip("fhw", grid, strict=True)))
        plan = drad.make_plan(
            "dynamicrad", expected["grid"], 16, expected["n_text_before"], expected["n_text_after"],
            sparsity=0.6, regime="high", profile=PLAIN,
        )  # fmt: skip
        sparse = call(model, kwargs)
        with masked_dense(plan):
            assert relative_error(sparse, call(eager, kwargs)) < 1e-5
    assert "when the graph runs, one plan for each grid it meets" in drad.report(model).summary()


@pytest.mark.slow
def test_the_report_counts_the_calls_of_a_symbolic_graph():
    compiled = compiled_wan("regional", {})
    for sizes in frames(5, 1):
        call(compiled, make("wan_t2v", **sizes)[1])
    static, symbolic = (site for site in drad.report(compiled).sites if site.replaced)
    assert static.sparsity == pytest.approx(0.6, abs=0.02)
    assert symbolic.sparsity == 0.0
    call(compiled, make("wan_t2v", f=8)[1])
    assert drad.report(compiled).sites[-2].sparsity == pytest.approx(0.3, abs=0.02)


@pytest.mark.slow
def test_an_option_plan_that_fits_one_length_is_not_denied_to_others():
    """A plan for 288 tokens, after a video of 240 and one of 336."""
    plan = drad.make_plan("dynamicrad", (6, 6, 8), 16, sparsity=0.6)
    compiled, eager = compiled_wan("whole", {"plan": plan, "sparsity": None}), make("wan_t2v")[0]
    for number, is_dense in ((5, True), (7, True), (6, False)):
        kwargs = make("wan_t2v", f=number)[1]
        assert (relative_error(call(compiled, kwargs), call(eager, kwargs)) < 1e-5) == is_dense
