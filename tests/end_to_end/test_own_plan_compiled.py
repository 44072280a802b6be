"""The option `plan` in compiled models: equal to masked dense attention, and never a plan of another length or grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import OPTIONS, call, compile_sparse, drad, make, masked_dense, relative_error
from support.marks import INNER
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from dynamicrad_compile.errors import StrictError

GRID, HEADS = (5, 6, 8), 2  # of wan_t2v: 240 tokens


def random_mask(blocks=15, heads=None, seed=0):
    shape = (blocks, blocks) if heads is None else (heads, blocks, blocks)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    return mask | torch.eye(blocks, dtype=torch.bool)


def plan_of(mask, tokens=240, **more):
    return drad.BlockPlan.from_mask(mask, block_q=16, block_kv=16, q_len=tokens, kv_len=tokens, **more)


def of_grid(grid, text_before, text_after):
    return drad.make_plan("radial", grid, 16, text_before, text_after, sink_frames=0)


@pytest.mark.parametrize("kind", ["plan", "mask", "function"])
def test_equals_masked_dense_attention(kind):
    model, kwargs, _ = make("wan_t2v")
    mask = random_mask()
    value = {"plan": plan_of(mask), "mask": mask.numpy(), "function": lambda *_: mask}[kind]
    compiled = compile_sparse(model, plan=value)
    sparse = call(compiled, kwargs)
    with masked_dense(plan_of(mask)):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert relative_error(sparse, call(model, kwargs)) > 1e-2
    report = drad.report(compiled)
    assert [site.sparsity for site in report.replaced] == pytest.approx([plan_of(mask).sparsity] * len(report.replaced))
    assert "not used" not in report.summary()


class Heads(nn.Module):
    """One attention over a patch embedding; returns [B, H, S, D]."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(32, 96)

    def operands(self, latents):
        tokens = self.patch(latents).flatten(2).transpose(1, 2)
        return [x.unflatten(-1, (HEADS, 16)).transpose(1, 2) for x in self.qkv(tokens).chunk(3, -1)]

    def forward(self, latents):
        return F.scaled_dot_product_attention(*self.operands(latents))


@pytest.mark.parametrize("inner", INNER)
def test_blocks_of_each_head(inner):
    model, latents = Heads(), torch.randn(1, 3, 4, 6, 10)  # 60 tokens
    mask = random_mask(4, HEADS)
    compiled = compile_sparse(model, plan=mask, inner=inner)
    with torch.no_grad():
        sparse = compiled(latents)
        allowed = mask.repeat_interleave(16, 1)[:, :60].repeat_interleave(16, 2)[..., :60]
        expected = F.scaled_dot_product_attention(*model.operands(latents), attn_mask=allowed)
    assert relative_error(sparse, expected) < 1e-5
    assert drad.report(compiled).replaced


def test_a_plan_of_another_length_leaves_attention_dense_and_says_why():
    model, kwargs, _ = make("wan_t2v")
    other = plan_of(random_mask(14), tokens=224)
    compiled = compile_sparse(model, plan=other)
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) < 1e-6
    report = drad.report(compiled)
    assert not report.replaced
    assert "the plan is for 224 tokens, the sequence has 240" in report.summary()
    assert "no attention of this graph uses the option plan" in report.summary()
    with pytest.raises(BackendCompilerFailed, match="the plan is for 224 tokens") as caught:
        call(compile_sparse(model, plan=other, strict=True), kwargs)
    assert isinstance(caught.value.inner_exception, StrictError)


def test_a_function_that_fails_is_an_error():
    model, kwargs, _ = make("wan_t2v")
    with pytest.raises(BackendCompilerFailed, match=r"function failed for grid 5x6x8: KeyError"):
        call(compile_sparse(model, plan=lambda grid, before, after: {}[grid]), kwargs)
    compiled = compile_sparse(model, plan=lambda *_: None, strict=True)  # asked for
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) < 1e-6
    with pytest.raises(BackendCompilerFailed, match=r"bool block mask .*got torch.float32 \[15, 15\]"):
        call(compile_sparse(model, plan=random_mask().float()), kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["auto", "dynamic"])
def test_other_sizes_never_meet_the_plan_of_the_first(dynamic):
    model, _, _ = make("wan_t2v")
    options = {**OPTIONS, "plan": of_grid}
    compiled = torch.compile(model, backend="dynamicrad", dynamic=dynamic, options=options)
    for sizes in [dict(f=5, h=6, w=8), dict(f=5, h=8, w=6), dict(f=7, h=6, w=8), dict(f=5, h=6, w=8)]:
        _, kwargs, expected = make("wan_t2v", **sizes)
        sparse = call(compiled, kwargs)
        with masked_dense(of_grid(expected["grid"], 0, 0)):
            assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert all(site.replaced for site in drad.report(compiled).sites if site.role == "video_self_attention")


def test_sites_of_two_lengths_and_a_plan_that_fits_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Heads(), Heads()

        def forward(self, latents):
            return self.first(latents), self.second(latents[:, :, :3])

    model, latents, mask = Two(), torch.randn(1, 3, 4, 6, 10), random_mask(4)
    compiled = compile_sparse(model, plan=plan_of(mask, tokens=60))
    with torch.no_grad():
        first, second = compiled(latents)
        with masked_dense(plan_of(mask, tokens=60)):
            expected = model(latents)
        dense = model(latents)
    assert relative_error(first, expected[0]) < 1e-5 < relative_error(first, dense[0])
    assert relative_error(second, dense[1]) < 1e-6
    report = drad.report(compiled)
    assert [site.replaced for site in report.sites] == [True, False]
    assert "the plan is for 60 tokens, the sequence has 45" in report.sites[1].reason
    both = compile_sparse(model, plan=of_grid)
    with torch.no_grad():
        both(latents)
    assert len(drad.report(both).replaced) == 2


def test_other_options_with_a_plan():
    model, kwargs, _ = make("wan_t2v")
    mask = random_mask()
    plain = call(compile_sparse(model, plan=mask), kwargs)
    compiled = compile_sparse(model, plan=mask, sparsity=0.9, pattern="radial", regime="low", mode="dynamic_threshold")
    assert torch.equal(call(compiled, kwargs), plain)
    said = "the option plan has no meaning for sparsity, pattern, mode, regime: not used"
    assert said in drad.report(compiled).summary()
    compensated = call(compile_sparse(model, plan=mask, compensate=1.0), kwargs)
    assert relative_error(compensated, plain) > 1e-3
    gated = compile_sparse(model, plan=mask, dense_steps=1)
    assert relative_error(call(gated, kwargs), call(model, kwargs)) < 1e-5  # the first step is dense


@pytest.mark.parametrize("dense", [{"dense_layers": 99}, {"min_tokens": 999}, {"pattern": "dense"}], ids=str)
def test_what_makes_attention_dense_does_so_with_a_plan(dense):
    compiled = compile_sparse(Heads(), plan=random_mask(4), **dense)
    call(compiled, {"latents": torch.randn(1, 3, 4, 6, 10)})
    (site,) = drad.report(compiled).sites
    assert site.role == "video_self_attention"
    assert not site.replaced


def test_training_and_gradients():
    model, latents, mask = Heads(), torch.randn(1, 3, 4, 6, 10), random_mask(4)
    compiled = compile_sparse(model, plan=mask)
    compiled(latents).square().mean().backward()
    found = model.qkv.weight.grad.clone()
    model.zero_grad()
    allowed = mask.repeat_interleave(16, 0)[:60].repeat_interleave(16, 1)[:, :60]
    F.scaled_dot_product_attention(*model.operands(latents), attn_mask=allowed).square().mean().backward()
    assert relative_error(found, model.qkv.weight.grad) < 1e-4


@pytest.mark.parametrize("value", [plan_of(random_mask()), of_grid], ids=["plan", "function"])
def test_regional_compilation_keeps_a_plan_to_its_grid(value):
    """One compiled block serves every grid of 240 tokens; only the one that the plan was made for runs sparse."""
    model, eager = make("wan_t2v")[0], make("wan_t2v")[0]
    model.compile_repeated_blocks(backend="dynamicrad", options={**OPTIONS, "plan": value})
    for sizes in (dict(f=5, h=6, w=8), dict(f=5, h=8, w=6), dict(f=5, h=6, w=8)):
        _, kwargs, expected = make("wan_t2v", **sizes)
        sparse = call(model, kwargs)
        plan = value if isinstance(value, drad.BlockPlan) else of_grid(GRID, 0, 0)
        plan = plan if expected["grid"] == GRID else drad.make_plan("dense", GRID, 16)
        with masked_dense(plan):
            assert relative_error(sparse, call(eager, kwargs)) < 1e-5
    assert "5x6x8 run sparse, other grids of as many tokens run dense" in drad.report(model).summary()


def test_an_exported_program_with_dynamic_frames_stays_dense():
    model, kwargs, _ = make("wan_t2v")
    frames = torch.export.Dim("frames", min=2, max=32)
    shapes = {name: {2: frames} if name == "hidden_states" else None for name in kwargs}
    with torch.no_grad():
        dynamic = torch.export.export(model, (), kwargs, dynamic_shapes=shapes)
        static = torch.export.export(model, (), kwargs)
    options = {"min_tokens": 0, "plan": plan_of(random_mask())}
    _, report = drad.rewrite(dynamic, options)
    assert not report.replaced
    assert any("are dynamic, and its plan is for one grid" in str(site.reason) for site in report.sites)
    module, report = drad.rewrite(static, options)
    assert len(report.replaced) == 2
    with masked_dense(options["plan"]), torch.no_grad():
        assert relative_error(module(**kwargs)[0], call(model, kwargs)) < 1e-5


def test_models_of_equal_code_with_a_mask_each():
    import copy

    model, kwargs, _ = make("wan_t2v")
    other = copy.deepcopy(model)
    near = (torch.arange(15)[:, None] - torch.arange(15)).abs() < 3
    compiled = [drad.compile(m, **{**OPTIONS, "inner": "eager", "plan": mask}) for m, mask in
                ((model, near), (other, near.clone().numpy()), (model, torch.ones_like(near)))]  # fmt: skip
    compiled.append(copy.deepcopy(compiled[0]))
    outputs = [call(one, kwargs) for one in compiled]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[3])
    assert relative_error(outputs[2], call(model, kwargs)) < 1e-5
    assert relative_error(outputs[0], outputs[2]) > 1e-4
