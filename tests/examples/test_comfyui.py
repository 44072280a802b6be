"""The ComfyUI nodes against stand-ins of its model patcher, compile helper and Wan model (support/comfy.py)."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, DynamicRadCompile, DynamicRadReport
from support import comfy
from support.graphs import drad, masked_dense, relative_error

EXACT = "min_tokens=0\nblock_size=16\nmode=static_ratio\ncompensate=0\ninner=eager\n"
LATENTS, TEXT = torch.randn(2, 4, 5, 12, 16), torch.randn(2, comfy.TEXT, 16)
STEPS = [900.0, 600.0, 300.0]


@pytest.fixture
def model(monkeypatch):
    comfy.install(monkeypatch)
    torch.manual_seed(0)
    return comfy.ModelPatcher(comfy.BaseModel(comfy.WanLike().eval()))


def compiled(model, sparsity=0.6, dense_steps=0, options=EXACT):
    return DynamicRadCompile().run(model, sparsity, dense_steps, options)[0]


@torch.no_grad()
def sample(patcher, steps=STEPS, latents=LATENTS):
    return patcher.sample(latents, steps, TEXT[: len(latents)])


def report(patcher):
    return DynamicRadReport().run(patcher, {"samples": LATENTS})


@pytest.mark.parametrize("rope", comfy.ROPES)
def test_sampling_is_that_of_masked_dense_attention(model, rope):
    model.model.diffusion_model = comfy.WanLike(rope).eval()
    fast = compiled(model)
    out = sample(fast)
    found = report(fast)
    latent, text = found["result"]
    assert latent["samples"] is LATENTS
    assert found["ui"] == {"text": [text]}
    assert "2 of 2 video self-attentions replaced (4 attentions in 1 graph)" in text  # one graph for all steps
    assert "blocks.*.self_attn (x2)" in text
    plan = drad.report(model.get_model_object("diffusion_model")).replaced[0].plan
    with masked_dense(plan):
        assert relative_error(out, sample(model)) < 1e-5
    assert relative_error(out, sample(model)) > 1e-4


def test_the_model_that_came_in_is_not_compiled(model):
    fast = compiled(model)
    assert fast is not model
    assert fast.model is model.model
    sample(model)
    with pytest.raises(drad.DynamicRadError, match=r"not compiled by DynamicRad Compile"):
        report(model)
    assert "no graph has been captured yet" in report(fast)["result"][1]
    assert type(model.model.diffusion_model) is comfy.WanLike


def test_the_first_steps_are_dense(model):
    fast = compiled(model, dense_steps=1)
    assert relative_error(sample(fast, STEPS[:1]), sample(model, STEPS[:1])) < 1e-6
    assert relative_error(sample(fast), sample(model)) > 1e-4
    for _ in range(2):  # a run begins where timesteps jump back
        assert relative_error(sample(fast, STEPS[:1]), sample(model, STEPS[:1])) < 1e-6


def test_a_clone_shares_what_was_compiled_and_a_second_node_takes_the_place_of_the_first(model):
    fast = compiled(model)
    sample(fast)
    clone = fast.clone()
    expected = sample(fast)
    assert torch.equal(sample(clone), expected)
    assert "(4 attentions in 1 graph)" in report(clone)["result"][1]
    dense = compiled(fast, sparsity=0.0)
    assert len(dense.wrappers["apply_model"]["torch.compile"]) == 1
    assert relative_error(sample(dense), sample(model)) < 1e-5
    assert "sparsity 0.0%" in report(dense)["result"][1]
    assert "sparsity 0.0%" not in report(fast)["result"][1]


@pytest.mark.slow
def test_another_resolution(model):
    fast, other = compiled(model), torch.randn(1, 4, 6, 16, 12)
    sample(fast)
    exact = compiled(model, sparsity=0.0)
    assert relative_error(sample(exact, latents=other), sample(model, latents=other)) < 1e-5
    sample(fast, latents=other)
    assert "grid 5x6x8, 6x8x6" in report(fast)["result"][1]


def test_a_patch_that_computes_attention_elsewhere_is_told(model):
    @torch.compiler.disable
    def override(attend, *args):
        return attend(*args)

    fast = compiled(model)
    fast.model_options["transformer_options"]["optimized_attention_override"] = override
    sample(fast)
    assert "attention calls ran outside every graph" in report(fast)["result"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [("sparsty=0.5", "Did you mean 'sparsity'"), ("strict", "an option expects KEY=VALUE"), ("plan=3", "plan")],
)
def test_wrong_options_are_told_by_the_node(model, options, message):
    with pytest.raises(drad.DynamicRadError, match=message):
        compiled(model, options=options)


def test_an_old_comfyui_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_api.torch_helpers", None)
    with pytest.raises(drad.DynamicRadError, match="has to be newer"):
        compiled(comfy.ModelPatcher(None))


def test_nodes_are_declared_as_comfyui_reads_them():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        names = {name for kind in inputs.values() for name in kind}
        assert set(inputs) <= {"required", "optional"}
        assert names == set(inspect.signature(getattr(node, node.FUNCTION)).parameters) - {"self"}
        assert all(isinstance(entry, tuple) for kind in inputs.values() for entry in kind.values())
        assert isinstance(node.RETURN_TYPES, tuple)
