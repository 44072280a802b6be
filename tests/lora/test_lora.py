"""LoRA through peft: loaded, swapped, scaled, fused, hot-swapped and trained under the backend."""

from __future__ import annotations

import pytest
import torch
from support.graphs import call, drad, first_output, make, relative_error
from support.replaced import VIDEO, check, check_call, compiled

pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def graphs_made():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def lora(seed, rank=4):
    """Weights of a LoRA for wan_t2v as load_lora_adapter takes them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in make("wan_t2v")[0].named_modules():
        if name.startswith("blocks.") and name.endswith(tuple(TARGETS)):
            state[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, module.in_features, generator=generator)
            state[f"{name}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, rank, generator=generator)
    return state


@pytest.mark.slow
def test_lora_swapped_scaled_and_fused():
    model, kwargs, expected = make("wan_t2v")
    plain = call(model, kwargs)
    model.load_lora_adapter(lora(1), adapter_name="one", prefix=None)
    model.load_lora_adapter(lora(2), adapter_name="two", prefix=None)
    fast = compiled(model, sparsity=0.6)
    for name in ("one", "two"):
        model.set_adapters([name], [1.0])
        check_call(fast, model, kwargs)
        assert relative_error(call(model, kwargs), plain) > 0.1
    seen = graphs_made()
    for name in ("one", "two"):
        model.set_adapters([name], [1.0])
        check_call(fast, model, kwargs)
    assert graphs_made() == seen
    for scale in (0.5, 0.6, 0.7):  # the second value makes the scale symbolic
        model.set_adapters(["one"], [scale])
        check_call(fast, model, kwargs)
    assert graphs_made() <= seen + 2
    model.fuse_lora(adapter_names=["one"])
    check_call(fast, model, kwargs)
    model.unfuse_lora()
    check_call(fast, model, kwargs)
    model.unload_lora()
    check_call(fast, model, kwargs)
    assert relative_error(call(model, kwargs), plain) < 1e-5
    replaced = [site.replaced for site in drad.report(fast).sites if site.role == VIDEO]
    assert replaced
    assert all(replaced)
    assert len(replaced) % expected["n_video_self_attn_nodes"] == 0


def test_lora_hot_swap_does_not_compile_again():
    model, kwargs, _ = make("wan_t2v")
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(lora(1), adapter_name="style", prefix=None)
    fast = compiled(model, sparsity=0.6)
    check_call(fast, model, kwargs)
    before, seen = call(fast, kwargs), graphs_made()
    for seed, rank in ((2, 4), (3, 6), (4, 8)):
        model.load_lora_adapter(lora(seed, rank), adapter_name="style", prefix=None, hotswap=True)
        check_call(fast, model, kwargs)
        assert relative_error(call(fast, kwargs), before) > 0.1
    assert graphs_made() == seen
    assert len(drad.report(fast).graphs) == 1


def test_lora_of_equal_rank_written_into_the_weights():
    """Without hot swapping: the same adapter, other numbers."""
    model, kwargs, _ = make("wan_t2v")
    model.load_lora_adapter(lora(1), adapter_name="style", prefix=None)
    fast = compiled(model, sparsity=0.6)
    check_call(fast, model, kwargs)
    seen = graphs_made()
    other = lora(2)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(other[name.replace(".style", "")])
    check_call(fast, model, kwargs)
    assert graphs_made() == seen


@pytest.mark.slow
def test_lora_with_inductor():
    model, kwargs, expected = make("wan_t2v")
    model.load_lora_adapter(lora(1), adapter_name="style", prefix=None)
    check(model, kwargs, expected, sparsities=(0.6,), inner="inductor")


def test_lora_training():
    """Only the adapter is trained; with every block kept its gradients are those of the dense model."""
    model, kwargs, _ = make("wan_t2v")
    model.load_lora_adapter(lora(1), adapter_name="style", prefix=None)
    model.requires_grad_(False)
    weights = [weight.requires_grad_() for name, weight in model.named_parameters() if "lora_" in name]
    want = torch.autograd.grad(first_output(model(**kwargs)).square().sum(), weights)
    fast = compiled(model, inner="aot_eager")
    got = torch.autograd.grad(first_output(fast(**kwargs)).square().sum(), weights)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-4
