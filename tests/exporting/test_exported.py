"""Exported programs: the same sites as in Dynamo's graphs, and outputs equal to masked dense attention."""

from __future__ import annotations

import pytest
import torch
from support.graphs import (
    call,
    capture,
    compile_sparse,
    drad,
    dynamic_batch,
    first_output,
    make,
    masked_dense,
    relative_error,
    sites_of,
)
from support.marks import fast, slow
from support.plain import PLAIN
from support.spellings import SPELLINGS
from support.tiny_dit import KEEP, LATENTS, SCALE, TinyDiT, dense_attention, sparse_plan, token_mask

from dynamicrad_compile.runtime.router import Router

MODELS = ["wan_t2v", "hunyuan_video", "cogvideox_5b", "ltx"]
OPTIONS = {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "sparsity": 0.6}


def export(model, kwargs, dynamic=None):
    with torch.no_grad():
        return torch.export.export(model, (), kwargs, dynamic_shapes=dynamic)


def run(module, kwargs):
    with torch.no_grad():
        return first_output(module(**kwargs))


def summary(site):
    return site.role, site.grid, tuple(site.text_tokens), site.shape, site.kv_length


@pytest.mark.parametrize("name", fast(MODELS, {"wan_t2v", "cogvideox_5b", "ltx"}))
def test_same_sites_as_dynamo_and_exact(name):
    model, kwargs, expected = make(name)
    module, report = drad.rewrite(export(model, kwargs), OPTIONS)
    dynamo = [
        (site.role, site.grid, tuple(site.text), site.q_shape, site.kv_length)
        for site in sites_of(capture(model, **kwargs))
    ]
    assert [summary(site) for site in report.sites] == dynamo
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    assert all(site.path for site in report.sites)
    plan = report.replaced[0].plan
    assert plan.sparsity > 0.2
    with masked_dense(plan):
        assert relative_error(run(module, kwargs), call(model, kwargs)) < 1e-5
    assert relative_error(run(module, kwargs), call(model, kwargs)) > 1e-6


@pytest.mark.parametrize("name", ["wan_t2v", slow("hunyuan_video"), slow("cogvideox_5b"), "ltx"])
def test_dynamic_batch(name):
    model, kwargs, expected = make(name, batch=2)
    module, report = drad.rewrite(export(model, kwargs, dynamic_batch(kwargs)), OPTIONS)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    for batch in (2, 3):
        _, other, _ = make(name, batch=batch)
        with masked_dense(report.replaced[0].plan):
            assert relative_error(run(module, other), call(model, other)) < 1e-5


def test_dynamic_frames_make_plans_when_the_program_runs():
    model, kwargs, _ = make("wan_t2v")
    frames = torch.export.Dim("frames", min=2, max=32)
    shapes = {name: {2: frames} if name == "hidden_states" else None for name in kwargs}
    module, report = drad.rewrite(export(model, kwargs, shapes), OPTIONS)
    assert len(report.replaced) == 2
    assert "made when the graph runs" in report.summary()
    for f in (5, 7):
        _, other, expected = make("wan_t2v", f=f)
        plan = drad.make_plan("dynamicrad", expected["grid"], 16, sparsity=0.6, regime="mid", profile=PLAIN)
        with masked_dense(plan):
            assert relative_error(run(module, other), call(model, other)) < 1e-5


class Packed(TinyDiT):
    """Latents come packed, and nothing in the graph says what their tokens are."""

    def tokens(self, latents):
        return latents


def test_dynamic_length_without_a_grid_in_a_shape_stays_dense():
    model = Packed(SPELLINGS["sdpa"][0])
    latents = torch.randn(1, 60, 32)
    tokens = torch.export.Dim("tokens", min=8, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (latents,), dynamic_shapes={"latents": {1: tokens}})
    module, report = drad.rewrite(program, {**OPTIONS, "grid": (4, 3, 5)})
    assert not report.replaced
    assert report.sites[0].code == "dynamic_sizes"
    for n in (60, 77):
        latents = torch.randn(1, n, 32)
        assert relative_error(module(latents), model(latents)) < 1e-5


def test_program_is_not_changed_and_the_result_can_be_exported_and_compiled(tmp_path):
    model, kwargs, _ = make("wan_t2v")
    program = export(model, kwargs)
    before = program.graph_module.code
    module, report = drad.rewrite(program, OPTIONS)
    assert program.graph_module.code == before
    sparse = run(module, kwargs)
    again = export(module, kwargs)
    torch.export.save(again, tmp_path / "sparse.pt2")
    loaded = torch.export.load(tmp_path / "sparse.pt2")
    for other in (again.module(), loaded.module(), torch.compile(module, backend="aot_eager", fullgraph=True)):
        assert relative_error(run(other, kwargs), sparse) < 1e-6
    assert not drad.rewrite(again, OPTIONS)[1].replaced  # nothing is left to do
    assert len(report.replaced) == 2


def test_same_output_as_the_backend():
    model, kwargs, _ = make("wan_t2v")
    module, _ = drad.rewrite(export(model, kwargs), OPTIONS)
    assert relative_error(run(module, kwargs), call(compile_sparse(model, sparsity=0.6), kwargs)) < 1e-6


@pytest.mark.parametrize(
    "name", ["upcast", "in-place", "bmm", "baddbmm", "einsum", "mask-where", "mask-added", "sdpa-3d"]
)
def test_written_out_attention(name):
    attend, layout = SPELLINGS[name]
    model = TinyDiT(attend, layout)
    with torch.no_grad():
        program = torch.export.export(model, (LATENTS,))
        module, report = drad.rewrite(program, {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "sparsity": 0.5})
        assert len(report.replaced) == 1, report.sites[0].reason
        out = module(LATENTS)
        keep = KEEP if "mask" in name else None
        expected = dense_attention(*model.operands(LATENTS), token_mask(sparse_plan()), SCALE, keep)
    if layout in ("bhsd", "nsd"):
        expected = expected.transpose(1, 2)
    assert relative_error(out, expected.reshape(out.shape)) < 1e-5


def test_decomposed_program_gets_a_hint():
    model, kwargs, _ = make("wan_t2v")
    program = export(model, kwargs).run_decompositions()
    module, report = drad.rewrite(program, OPTIONS)
    assert not report.sites
    assert "was run_decompositions() called? Rewrite the program before it" in report.summary()
    assert relative_error(run(module, kwargs), call(model, kwargs)) < 1e-5


def test_strict_and_wrong_arguments():
    model, kwargs, _ = make("wan_t2v")
    with pytest.raises(drad.DynamicRadError, match=r"got WanTransformer3DModel.*torch.compile"):
        drad.rewrite(model)
    program = export(model, kwargs)
    with pytest.raises(drad.OptionsError, match="Did you mean 'sparsity'"):
        drad.rewrite(program, {"spasity": 0.5})
    with pytest.raises(drad.StrictError, match="240 tokens are fewer"):
        drad.rewrite(program, {"strict": True, "min_tokens": 1000})
    with pytest.raises(drad.GridError, match="270 tokens does not fit the 240"):
        drad.rewrite(program, {"grid": (5, 6, 9)})


@pytest.mark.parametrize("mode", ["static_ratio", slow("dynamic_threshold")])
@pytest.mark.parametrize("name", ["wan_t2v", slow("hunyuan_video")])
def test_router_in_an_exported_program(name, mode):
    model, kwargs, _ = make(name, batch=2)
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    router = Router(weight - weight.mean(0), torch.zeros(3))
    prompts = 3 * router.weight[[0, 2], None].expand(2, *kwargs["encoder_hidden_states"].shape[1:]).contiguous()
    kwargs = {**kwargs, "encoder_hidden_states": prompts}
    options = {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "mode": mode}
    module, report = drad.rewrite(export(model, kwargs), {**options, "router": router})
    assert "chosen by the router" in str(report)
    again = torch.export.export(module, (), kwargs)
    assert not again.graph_signature.buffers_to_mutate  # each call stands for itself
    out = run(module, kwargs)
    assert relative_error(run(again.module(), kwargs), out) < 1e-6
    for row, regime in enumerate(("low", "high")):
        alone, _ = drad.rewrite(export(model, kwargs), {**options, "regime": regime})
        assert relative_error(run(alone, kwargs)[row], out[row]) < 1e-5
