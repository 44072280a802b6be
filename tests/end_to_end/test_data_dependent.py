"""Models whose lengths depend on data, compiled by name alone: whole in their graphs, and so for no other backend."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, call, drad, make, masked_dense, relative_error
from support.marks import slow
from support.plain import PLAIN
from zoo.more import ZOO_MORE

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")
SPARSE = {**OPTIONS, "sparsity": 0.6}


def by_name(model):
    return torch.compile(model, backend="dynamicrad", options=SPARSE)


def plan_for(grid, before, after):
    return drad.make_plan("dynamicrad", grid, 16, before, after, sparsity=0.6, regime="high", profile=PLAIN)


def check(compiled, model, kwargs, plan):
    sparse = call(compiled, kwargs)
    assert relative_error(sparse, call(model, kwargs)) > 1e-4
    with masked_dense(plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_text_cut_to_its_valid_tokens(batch):
    model, kwargs, expected = make("mochi", batch=batch)
    compiled = by_name(model)
    for valid in (6, 4, 9):
        mask = (torch.arange(9) < valid)[None].expand(batch, -1).contiguous()
        check(compiled, model, {**kwargs, "encoder_attention_mask": mask}, plan_for(expected["grid"], 0, valid))
    report = drad.report(compiled)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    assert len(report.graphs) == 1
    assert report.replaced[0].shape is None
    assert tuple(report.replaced[0].text_tokens) == (0, None)


def test_text_sorted_by_validity_and_hidden_as_keys_and_as_queries():
    """A branch on data breaks its graph; the grid of the second is in its inputs, whose sizes are symbolic."""
    model, kwargs, expected = make("hunyuan_video15")
    compiled = by_name(model)
    for f, h, w in ((5, 6, 8), (5, 6, 8), (7, 6, 8), (5, 8, 10), (9, 4, 8)):
        _, kwargs, expected = make("hunyuan_video15", f=f, h=h, w=w)
        check(compiled, model, kwargs, plan_for((f, h, w), 0, expected["n_text_after"]))
    report = drad.report(compiled)
    assert all(site.replaced for site in report.sites if site.role == "video_self_attention")
    assert len(report.graphs) <= 6  # two of the first grid, of another number of frames, and of any


@pytest.mark.parametrize("name", ["hunyuan_framepack", slow("hunyuan_framepack_b2")])
def test_history_before_and_text_cut_to_its_valid_tokens_behind(name):
    model, kwargs, expected = ZOO_MORE[name]()
    compiled = by_name(model)
    check(compiled, model, kwargs, plan_for(expected["grid"], expected["n_text_before"], expected["n_text_after"]))
    report = drad.report(compiled)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    assert len(report.graphs) == 1


def test_compiled_again_after_a_reset():
    model, kwargs, expected = make("mochi")
    compiled = by_name(model)
    for _ in range(2):
        torch._dynamo.reset()
        call(compiled, kwargs)
        assert len(drad.report(compiled).replaced) == expected["n_video_self_attn_nodes"]


@pytest.mark.parametrize("backend", ["dynamicrad", "eager"])
def test_other_backends_capture_as_ever(backend):
    def kept(x):
        return torch.nonzero(x).sum() + 1

    before = torch._dynamo.config.capture_dynamic_output_shape_ops
    x = torch.tensor([0, 3, 0, 1])
    torch.compile(lambda x: x + 1, backend="dynamicrad")(x)
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    assert torch.compile(kept, backend=backend)(x) == kept(x)
    assert bool(breaks) == (backend == "eager")
    assert torch._dynamo.config.capture_dynamic_output_shape_ops == before


def test_explain_sees_what_the_backend_will():
    model, kwargs, expected = make("mochi")
    report = drad.explain(model, options=SPARSE, **kwargs)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    assert "outside every graph" not in report.summary()
