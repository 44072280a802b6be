"""drad.compile and explain on models whose graphs break: lengths that depend on data."""

from __future__ import annotations

import pytest
import torch
from support.conditioned import NoTime
from support.graphs import OPTIONS, call, drad, make, masked_dense, relative_error
from support.plain import PLAIN

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


@pytest.mark.parametrize("batch", [1, 2])
def test_mochi_is_sparse_and_follows_the_number_of_valid_text_tokens(batch):
    model, kwargs, expected = make("mochi", batch=batch)
    compiled = drad.compile(model, **OPTIONS, sparsity=0.6)
    for valid in (6, 4, 9):
        mask = (torch.arange(9) < valid)[None].expand(batch, -1).contiguous()
        given = {**kwargs, "encoder_attention_mask": mask}
        plan = drad.make_plan("dynamicrad", expected["grid"], 16, 0, valid, sparsity=0.6, regime="mid", profile=PLAIN)
        sparse = call(compiled, given)
        with masked_dense(plan):
            assert relative_error(sparse, call(model, given)) < 1e-5
    report = drad.report(compiled)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    assert len(report.graphs) == 1
    assert report.replaced[0].shape is None
    assert tuple(report.replaced[0].text_tokens) == (0, None)


def test_hunyuan_video_15_is_sparse():
    """Its mask hides padded text as keys and as queries; its text is sorted by validity, so lengths depend on data."""
    model, kwargs, expected = make("hunyuan_video15")
    compiled = drad.compile(model, **OPTIONS, sparsity=0.6)
    plan = drad.make_plan(
        "dynamicrad", expected["grid"], 16, 0, expected["n_text_after"], sparsity=0.6, regime="mid", profile=PLAIN
    )
    for _ in range(2):
        sparse = call(compiled, kwargs)
        with masked_dense(plan):
            assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert len(drad.report(compiled).replaced) == expected["n_video_self_attn_nodes"]


def test_capture_settings_are_for_this_model_alone():
    compiled = drad.compile(torch.nn.Linear(3, 3), **OPTIONS)
    before = torch._dynamo.config.capture_scalar_outputs
    call(compiled, {"input": torch.randn(2, 3)})
    assert torch._dynamo.config.capture_scalar_outputs == before


def test_bad_options_are_refused_at_once():
    with pytest.raises(drad.OptionsError, match="unknown option 'spasity'"):
        drad.compile(torch.nn.Linear(3, 3), spasity=0.5)


class OutOfReach(NoTime):
    """Its attention runs where Dynamo may not look."""

    attend = torch._dynamo.disable(NoTime.attend)


def test_explain_counts_attention_outside_the_graphs():
    inputs = torch.randn(1, 3, 4, 6, 10), torch.randn(1, 7, 8)
    assert "2 attention calls ran outside every graph" in drad.explain(OutOfReach(), *inputs).summary()
    assert "outside every graph" not in drad.explain(NoTime(), *inputs).summary()


@pytest.mark.slow
def test_explain_counts_attention_where_dynamo_gave_up():
    model, kwargs, _ = make("mochi")
    report = drad.explain(model, **kwargs)
    assert "2 attention calls ran outside every graph" in report.summary()
    torch._dynamo.reset()
    report = drad.explain(drad.compile(model), **kwargs)
    assert "outside every graph" not in report.summary()


def test_explain_runs_nothing_and_changes_nothing():
    model, kwargs, _ = make("wan_t2v")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = [p.clone() for p in model.parameters()]
    report = drad.explain(model, options={"min_tokens": 0}, **kwargs)
    assert len(report.replaced) == 2
    assert report.sites[0].source.endswith(tuple("0123456789"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "outside" not in report.summary()


def test_explain_of_another_length_which_dynamo_takes_for_any():
    for f in (5, 7):
        model, kwargs, expected = make("wan_t2v", f=f)
        report = drad.explain(model, options={"min_tokens": 0, "block_size": 16}, **kwargs)
        assert {site.grid for site in report.replaced} == {expected["grid"]}


def test_a_mode_of_inductor_beside_options():
    compiled = drad.compile(torch.nn.Linear(3, 3), mode="reduce-overhead", sparsity=0.5)
    assert compiled(torch.randn(2, 3)).shape == (2, 3)
    assert drad.compile(torch.nn.Linear(3, 3), mode="dynamic_threshold", inner="eager")(torch.randn(2, 3)).shape == (
        2,
        3,
    )
