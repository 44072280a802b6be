"""What users do to a model besides compiling it: attention backends, fused projections, quantised weights, ...

The sites stay replaced, the output is the model's own with every block kept, and that of masked dense attention with
a sparse plan.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.graphs import call, drad, make, masked_dense, relative_error
from support.marks import fast, slow
from support.replaced import VIDEO, check, check_call, compiled

MODELS = ["wan_t2v", slow("hunyuan_video")]


@pytest.fixture(autouse=True)
def _native_backend():
    """set_attention_backend of one model changes the default of all."""
    yield
    registry = pytest.importorskip("diffusers.models.attention_dispatch")
    registry._AttentionBackendRegistry.set_active_backend(registry.AttentionBackendName.NATIVE)


@pytest.mark.parametrize("name", ["wan_t2v", "cogvideox_5b"])
def test_fused_projections(name):
    model, kwargs, expected = make(name)
    model.fuse_qkv_projections()
    check(model, kwargs, expected, sparsities=(0.0, 0.6) if name == "wan_t2v" else (0.6,))


@pytest.mark.parametrize("name", MODELS)
def test_channels_last(name):
    model, kwargs, expected = make(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    latents = kwargs["hidden_states"]
    if latents.dim() == 5:
        kwargs["hidden_states"] = latents.to(memory_format=torch.channels_last_3d)
    check(model, kwargs, expected, sparsities=(0.0, 0.6) if name == "wan_t2v" else (0.6,))


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    """The sparse model is as near to float32 as the dense one is."""
    model, kwargs, expected = make(name)
    exact = call(model, kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.backends.mkldnn.flags(enabled=False):
        dense = call(model, kwargs)
        check(model, kwargs, expected, tolerance=1e-2, sparsities=(0.6,))
        sparse = call(compiled(model), kwargs)
    assert sparse.dtype == dense.dtype
    assert relative_error(sparse, exact) < 1.2 * relative_error(dense, exact)


def test_autocast_on_and_off_compile_apart():
    model, kwargs, _ = make("wan_t2v")
    fast = compiled(model)
    before = call(fast, kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.backends.mkldnn.flags(enabled=False):
        assert relative_error(call(fast, kwargs), before) > 1e-4
    assert torch.equal(call(fast, kwargs), before)


@pytest.mark.parametrize("backend", fast(["native", "_native_math", "_native_flash", "flex"], {"native", "flex"}))
def test_attention_backends(backend):
    model, kwargs, expected = make("wan_t2v")
    model.set_attention_backend(backend)
    check(model, kwargs, expected, sparsities=(0.0,))


@pytest.mark.slow
def test_attention_backend_switched_after_compiling():
    model, kwargs, _ = make("wan_t2v")
    reference, _, _ = make("wan_t2v")
    reference.set_attention_backend("native")
    fast = compiled(model, sparsity=0.6)
    for backend in ("native", "flex", "_native_math", "native"):
        model.set_attention_backend(backend)
        check_call(fast, reference, kwargs)
    assert all(site.replaced for site in drad.report(fast).sites if site.role == VIDEO)


@pytest.mark.slow
def test_flex_with_a_mask_stays_dense():
    """diffusers makes a BlockMask of the prompt's mask; the advice names the backend that works."""
    model, kwargs, expected = make("hunyuan_video")
    model.set_attention_backend("flex")
    fast = compiled(model)
    assert relative_error(call(fast, kwargs), call(model, kwargs)) < 1e-5
    dense = [site for site in drad.report(fast).sites if site.code == "block_mask"]
    assert len(dense) == expected["n_video_self_attn_nodes"]
    assert all("set_attention_backend('native')" in site.advice for site in dense)


@pytest.mark.parametrize(("backend", "package"), [("flash", "flash_attn"), ("sage", "sageattention")])
def test_absent_attention_backends_raise_as_without_us(backend, package):
    model, _, _ = make("wan_t2v")
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(RuntimeError, match="not usable"):
        model.set_attention_backend(backend)


@pytest.mark.parametrize("name", MODELS)
def test_guidance_as_a_batch_of_two_and_as_two_calls(name):
    model, kwargs, expected = make(name, batch=2)
    halves = [{k: v[i : i + 1] if isinstance(v, torch.Tensor) and len(v) == 2 else v for k, v in kwargs.items()}
              for i in range(2)]  # fmt: skip
    fast = compiled(model, sparsity=0.6)
    both = call(fast, kwargs)
    apart = torch.cat([call(fast, half) for half in halves])
    assert relative_error(both, apart) < 1e-5
    with masked_dense(drad.report(fast).replaced[0].plan):
        assert relative_error(both, call(model, kwargs)) < 1e-5
    report = drad.report(fast)
    assert len(report.graphs) <= 2
    assert len(report.replaced) == expected["n_video_self_attn_nodes"] * len(report.graphs)


QUANTISED = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


@pytest.mark.parametrize("config", QUANTISED)
def test_torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    model, kwargs, expected = make("wan_t2v")
    before = call(model, kwargs)
    quantization.quantize_(model, getattr(quantization, config)())
    loss = relative_error(call(model, kwargs), before)
    assert loss > 1e-4
    # An activation that is quantised at every call may round to the next of 255 steps: a part of what it loses anyway.
    check(
        model, kwargs, expected, tolerance=loss if "Dynamic" in config else 1e-5, sparsities=(0.0,), inner="aot_eager"
    )
