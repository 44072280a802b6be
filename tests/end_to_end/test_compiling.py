"""drad.compile and explain."""

from __future__ import annotations

import pytest
import torch
from support.conditioned import NoTime
from support.graphs import drad, make

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


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
