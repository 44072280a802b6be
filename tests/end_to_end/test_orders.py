"""Blocks that are boxes of the video, in compiled models: right in every kind of graph that plans are written into."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, call, compile_sparse, drad, first_output, make, masked_dense, relative_error
from support.marks import slow

from dynamicrad_compile.runtime.router import Router

BOX = (4, 2, 2)
STATIC = dict(mode="static_ratio", sparsity=0.6, compensate=0.0, box=BOX, regime="mid", profile="default")


def plan_for(expected, **more):
    text = expected["n_text_before"], expected["n_text_after"]
    given = dict(sparsity=0.6, compensate=0.0, box=BOX, regime="mid", profile="default", **more)
    return drad.make_plan("dynamicrad", expected["grid"], 16, *text, **given)


CASES = [("wan_t2v", "eager"), slow("wan_t2v", "inductor"), ("hunyuan_video", "eager"), ("cogvideox_5b", "eager")]


@pytest.mark.parametrize(("name", "inner"), [*CASES, slow("ltx", "eager")])
def test_equals_masked_dense_attention(name, inner):
    """With text in front, behind, or hidden by a mask."""
    model, kwargs, expected = make(name)
    sparse = call(torch.compile(model, backend="dynamicrad", options={**OPTIONS, **STATIC, "inner": inner}), kwargs)
    with masked_dense(plan_for(expected)):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert relative_error(sparse, call(model, kwargs)) > 1e-3


@pytest.mark.parametrize("mode", ["static_ratio", "dynamic_threshold"])
def test_at_sparsity_zero_it_is_dense_attention(mode):
    model, kwargs, _ = make("wan_t2v")
    compiled = compile_sparse(model, **{**STATIC, "mode": mode, "sparsity": 0.0})
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) < 1e-5


@pytest.mark.parametrize("name", ["wan_t2v", slow("hunyuan_video")])
def test_each_grid_of_a_symbolic_or_regional_graph_gets_its_own_order(name):
    model, eager = make(name)[0], make(name)[0]
    model.compile_repeated_blocks(backend="dynamicrad", options={**OPTIONS, **STATIC})
    for grid in [(5, 6, 8), (5, 8, 6), (6, 4, 8), (3, 4, 16)]:
        _, kwargs, expected = make(name, **dict(zip("fhw", grid, strict=True)))
        sparse = call(model, kwargs)
        with masked_dense(plan_for(expected)):
            assert relative_error(sparse, call(eager, kwargs)) < 1e-5


@pytest.mark.slow
def test_symbolic_sizes():
    compiled, eager = compile_sparse(make("wan_t2v")[0], **STATIC), make("wan_t2v")[0]
    for frames in (5, 6, 9):
        _, kwargs, expected = make("wan_t2v", f=frames)
        sparse = call(compiled, kwargs)
        with masked_dense(plan_for(expected)):
            assert relative_error(sparse, call(eager, kwargs)) < 1e-5
    assert len(drad.report(compiled).graphs) == 2


PROFILE = """
schema = 1
[profile]
name = "boxes"
block_size = 16
mode = "{mode}"
[regimes.low]
static_ratio = {{ sparsity = 0.7, box = [4, 2, 2], compensate = 1.0 }}
dynamic_threshold = {{ sparsity = 0.0, criterion = "ratio", near = 0.3, far = 0.3, box = [4, 2, 2], compensate = 1.0 }}
[regimes.mid]
static_ratio = {{ sparsity = 0.6, box = "raster" }}
dynamic_threshold = {{ sparsity = 0.4, criterion = "ratio", near = 0.3, far = 0.3 }}
[regimes.high]
static_ratio = {{ sparsity = 0.5, box = [1, 4, 4] }}
dynamic_threshold = {{ sparsity = 0.0, criterion = "ratio", near = 0.4, far = 0.4, box = [1, 4, 4] }}
"""
REGIMES = ("low", "mid", "high")


ROWS = [
    ("dynamic_threshold", "eager", None),
    ("static_ratio", "eager", None),
    slow("static_ratio", "inductor", None),
    ("dynamic_threshold", "eager", (4, 2, 2)),
]


@pytest.mark.parametrize(("mode", "inner", "box"), ROWS)
def test_each_row_of_a_batch_has_the_order_of_its_regime(mode, inner, box, tmp_path):
    """A box of its own in each regime, or the same for all."""
    profile = tmp_path / "boxes.toml"
    profile.write_text(PROFILE.format(mode=mode))
    model, kwargs, _ = make("wan_t2v")
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    weight -= weight.mean(0)
    prompts = 3 * weight[:, None].expand(3, 7, 16)
    batch = {name: kwargs[name].repeat_interleave(3, 0) for name in ("hidden_states", "timestep")}
    options = dict(profile=str(profile), dense_steps=0, box=box)
    compiled = compile_sparse(model, router=Router(weight, torch.zeros(3)), inner=inner, **options)
    with torch.no_grad():
        out = first_output(compiled(**{**kwargs, **batch, "encoder_hidden_states": prompts.contiguous()}))
        for row, regime in enumerate(REGIMES):
            alone = compile_sparse(model, regime=regime, **options)
            expected = first_output(alone(**{**kwargs, "encoder_hidden_states": prompts[row : row + 1].contiguous()}))
            assert relative_error(out[row : row + 1], expected) < 1e-5


def test_dense_steps_and_kept_blocks():
    model, kwargs, _ = make("wan_t2v")
    options = {**STATIC, "mode": "dynamic_threshold", "dense_steps": 1}
    compiled = compile_sparse(model, refresh_steps=3, **options)
    each = compile_sparse(make("wan_t2v")[0], **options)
    found, expected = [], []
    for timestep in (900.0, 700.0, 500.0):
        now = {**kwargs, "timestep": torch.full_like(kwargs["timestep"], timestep)}
        found.append(call(compiled, now))
        expected.append(call(each, now))
        if timestep == 900.0:
            assert relative_error(found[0], call(model, now)) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-5  # chosen at the first sparse step
    assert torch.isfinite(found[2]).all()


@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_gradients_are_those_of_masked_attention(inner):
    model, kwargs, expected = make("wan_t2v")
    model.requires_grad_(True)
    compiled = torch.compile(model, backend="dynamicrad", options={**OPTIONS, **STATIC, "inner": inner})
    first_output(compiled(**kwargs)).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with masked_dense(plan_for(expected)), torch.enable_grad():
        first_output(model(**kwargs)).square().mean().backward()
    names = [name for name in found if "attn1.to_" in name]
    assert names
    for name in names:
        assert relative_error(found[name], dict(model.named_parameters())[name].grad) < 1e-4


def test_an_own_plan_may_have_an_order():
    model, kwargs, expected = make("wan_t2v")
    plan = plan_for(expected)
    sparse = call(compile_sparse(model, plan=plan), kwargs)
    with masked_dense(plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(box=(4, 4, 4), block_size=16), "leave block_size out, or make it 64"),
        (dict(box=(3, 1, 1)), "a box is one block"),
        (dict(box=(4, 4)), "three positive integers"),
        (dict(rank="errors"), "'mass' or 'error'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(drad.OptionsError, match=message):
        drad.Options(**options)


def test_a_box_says_how_large_a_block_is():
    assert drad.Options(box=[4, 4, 4]).block_size == 64
    assert drad.Options(box="raster").block_size is None
