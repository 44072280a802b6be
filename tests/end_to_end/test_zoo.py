"""Real diffusers classes: the right sites, grid and text are found, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from support.conditioned import check_conditions
from support.graphs import call, capture, compile_sparse, drad, make, masked_dense, relative_error, sites_of
from support.marks import fast, slow
from support.replaced import check_replaced
from zoo.models import ZOO

DATA_DEPENDENT = {"hunyuan_video15", "mochi", "mochi_b2"}  # lengths, which Dynamo captures for the backend alone
SUPPORTED = [name for name in ZOO if name not in DATA_DEPENDENT]
# Numerics are checked on one model of each way to build a sequence.
NUMERICS = ["wan_t2v", "wan_i2v", "hunyuan_video", "cogvideox_5b", "ltx", "cosmos1", "allegro"]
OTHERS = ["latte", "sana_video", "neg_flux", "neg_temporal"]  # no attention over a whole video


def check_sites(sites, expected):
    video = [site for site in sites if site.role == "video_self_attention"]
    assert len(sites) == expected["n_attn_nodes"]
    assert len(video) == expected["n_video_self_attn_nodes"], [(s.path, s.role, s.reason) for s in sites]
    for site in video:
        assert site.grid == expected["grid"]
        assert tuple(site.text) == (expected["n_text_before"], expected["n_text_after"])
        assert not site.reason
    for site in sites:
        assert site.role == "video_self_attention" or site.reason


def no_plan(site):
    pytest.fail(f"a plan was asked for {site.path}")


@pytest.mark.parametrize("name", SUPPORTED)
def test_sites_grid_text_and_conditions(name):
    """The numerics below meet the first grid."""
    model, kwargs, expected = make(name, **(dict(f=6, h=6, w=6) if name in NUMERICS else {}))
    captured = capture(model, build_plan=no_plan if name in OTHERS else lambda site: None, **kwargs)
    check_sites(sites_of(captured), expected)
    check_conditions(name, captured)
    if name == "latte":
        assert {"spatial_attention", "temporal_attention"} <= {site.role for site in sites_of(captured)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in NUMERICS + OTHERS])
def test_sites_on_another_grid(name):
    model, kwargs, expected = make(name, f=3, h=5, w=7, batch=2)
    check_sites(sites_of(capture(model, **kwargs)), expected)


@pytest.mark.parametrize("name", fast(sorted(DATA_DEPENDENT), {"mochi"}))
def test_lengths_that_depend_on_data(name):
    model, kwargs, expected = make(name)
    report = drad.explain(model, options={"min_tokens": 0}, **kwargs)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    assert all(site.grid == expected["grid"] for site in report.replaced)


@pytest.mark.parametrize("name", fast(NUMERICS, {"wan_t2v", "hunyuan_video"}))
def test_keep_everything_equals_eager(name):
    model, kwargs, expected = make(name, batch=2)
    compiled = compile_sparse(model, sparsity=0.0)
    eager = call(model, kwargs)
    assert relative_error(call(compiled, kwargs), eager) < 1e-5
    assert len(drad.report(compiled).replaced) == expected["n_video_self_attn_nodes"]


@pytest.mark.parametrize("name", NUMERICS)
def test_any_plan_equals_masked_dense(name):
    options = dict(pattern="radial", decay_factor=0.3) if name == "wan_t2v" else dict(sparsity=0.6)
    model, kwargs, expected = make(name, batch=2)
    compiled = compile_sparse(model, **options)
    sparse = call(compiled, kwargs)
    report = drad.report(compiled)
    check_replaced(report, expected)
    plan = report.replaced[0].plan
    assert plan.sparsity > 0.05
    with masked_dense(plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert relative_error(sparse, call(model, kwargs)) > 1e-6


@pytest.mark.parametrize("name", ["wan_t2v", slow("hunyuan_video")])
def test_inductor_agrees_with_eager(name):
    model, kwargs, _ = make(name)
    compiled = compile_sparse(model, sparsity=0.5, inner="inductor")
    sparse = call(compiled, kwargs)
    plan = drad.report(compiled).replaced[0].plan
    with masked_dense(plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5


def test_half_precision_model():
    model, kwargs, _ = make("wan_t2v")
    model = model.to(torch.bfloat16)
    kwargs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    compiled = compile_sparse(model, sparsity=0.0)
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) < 2e-2  # bf16 rounds to 2^-8
