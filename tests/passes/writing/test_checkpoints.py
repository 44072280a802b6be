"""Attention inside gradient checkpoints, nested compile regions and other subgraphs; context parallelism."""

from __future__ import annotations

import pytest
import torch
from support.graphs import (
    OPTIONS,
    compile_sparse,
    drad,
    first_output,
    make,
    masked_dense,
    plan_each,
    relative_error,
    targets,
)
from support.plain import PLAIN
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynamicrad_compile.passes import PASSES, PassContext, run_passes
from dynamicrad_compile.passes.writing.checkpoints import close_regions, open_regions, region_begins, region_ends
from dynamicrad_compile.plans.table import PlanTable

OP = "dynamicrad.block_sparse_attention.default"
LATENTS = torch.randn(1, 3, 4, 6, 10, generator=torch.Generator().manual_seed(1))  # 4 x 3 x 5 = 60 tokens


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + out.transpose(1, 2).flatten(2)


class Layers(nn.Module):
    """A patch embedding, and blocks called through `wrap(block, x)`."""

    def __init__(self, wrap, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.wrap = wrap
        self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, latents):
        x = self.patch(latents).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = self.wrap(block, x)
        return x


def checkpointed(block, x):
    return checkpoint(block, x, use_reentrant=False)


def twice_checkpointed(block, x):
    return checkpoint(lambda y: checkpointed(block, y) * 2, x, use_reentrant=False)


@torch.compiler.nested_compile_region
def nested(block, x):
    return block(x)


WRAPS = [checkpointed, twice_checkpointed, nested]


def through_cond(block, x):
    return torch.cond(x.sum() > -1e9, block, lambda y: y + 1, (x,))


PLAN = drad.make_plan("dynamicrad", (4, 3, 5), 16, sparsity=0.5, regime="mid", profile=PLAIN)
TABLE = PlanTable.of(PLAN)


def plan_of(site):
    assert site.grid == (4, 3, 5)
    return TABLE


def captured(model, build_plan=plan_of, training=False, closed_as_training=None):
    """(gm, context) of the one graph of a model after the passes."""
    torch._dynamo.reset()
    found = []

    def backend(gm, example_inputs):
        context = PassContext(plan_each(build_plan), training=training, example_inputs=example_inputs)
        if closed_as_training is None:
            run_passes(gm, context)
        else:
            regions = open_regions(gm)
            for step in PASSES:
                step(gm, context)
            close_regions(gm, regions, closed_as_training)
            gm.graph.lint()
            gm.recompile()
        found.append((gm, context))
        return gm.forward

    out = torch.compile(model, backend=backend, fullgraph=True)(LATENTS)
    ((gm, context),) = found
    return out, gm, context


def check_sparse(out, model):
    with masked_dense(PLAN), torch.no_grad():
        assert relative_error(out, model(LATENTS)) < 1e-5
    with torch.no_grad():
        assert relative_error(out, model(LATENTS)) > 1e-3


@pytest.mark.parametrize("wrap", WRAPS, ids=["once", "twice", "nested"])
def test_hidden_attention_is_found_and_replaced(wrap):
    model = Layers(wrap)
    with torch.no_grad():
        out, gm, context = captured(model)
    assert [site.replaced for site in context.sites] == [True, True]
    paths = [site.path for site in context.sites]
    assert paths == (["blocks.0"] * 2 if wrap is nested else ["blocks.0", "blocks.1"])  # Dynamo traces one body for all
    assert targets(gm).count(OP) == 2
    assert not {region_begins, region_ends} & {node.target for node in gm.graph.nodes}
    check_sparse(out, model)


@pytest.mark.parametrize("wrap", WRAPS, ids=["once", "twice", "nested"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_replaced_is_handed_on_as_it_came(wrap, training):
    model = Layers(wrap)

    def original():
        texts = []

        def backend(gm, example_inputs):
            texts.append(targets(gm))
            return gm.forward

        torch._dynamo.reset()
        torch.compile(model, backend=backend, fullgraph=True)(LATENTS)
        return texts[0]

    before = original()
    out, gm, context = captured(model, lambda site: None, training)
    assert targets(gm) == before
    assert len(context.sites) == 2
    assert relative_error(out, model(LATENTS)) < 1e-6


@pytest.mark.parametrize("wrap", [checkpointed, twice_checkpointed], ids=lambda f: f.__name__)
def test_changed_checkpoints_are_wrapped_again(wrap):
    model = Layers(wrap, layers=3)
    with torch.no_grad():
        out, gm, _ = captured(model, closed_as_training=True)
    assert targets(gm).count("tag_activation_checkpoint") == 3
    assert OP not in targets(gm)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    assert sum("plan" in name for name in names) == len(TABLE.tensors())  # shared by the layers
    check_sparse(out, model)


def test_wrapped_again_inside_changes_nothing_for_gradients():
    """A dense stand-in for the op: the rewritten checkpoint is differentiated and recomputed like the original."""
    model = Layers(checkpointed)
    weights = list(model.parameters())
    want = torch.autograd.grad(model(LATENTS).square().sum(), weights)

    def backend(gm, example_inputs):
        regions = open_regions(gm)
        for node in gm.graph.find_nodes(op="call_method", target="flatten"):
            with gm.graph.inserting_before(node):
                same = gm.graph.call_function(torch.add, (node.args[0], 0))
            node.update_arg(0, same)
        close_regions(gm, regions, training=True)
        gm.graph.lint()
        gm.recompile()
        assert targets(gm).count("tag_activation_checkpoint") == 2
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = torch.autograd.grad(compiled(LATENTS).square().sum(), weights)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_other_subgraphs_stay_dense_with_a_reason():
    model = Layers(through_cond)
    with torch.no_grad():
        out, _, context = captured(model)
    assert {site.reason.code for site in context.sites} == {"inside_operator"}
    assert len(context.sites) == 2
    with torch.no_grad():
        assert relative_error(out, model(LATENTS)) < 1e-6


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "frozen"])
def test_diffusers_model_in_train_mode(grad):
    """diffusers checkpoints its blocks only where gradients are on."""
    model, kwargs, expected = make("wan_t2v")
    model.enable_gradient_checkpointing()
    model.train().requires_grad_(False)
    compiled = compile_sparse(model, sparsity=0.6)
    with torch.set_grad_enabled(grad):
        out = first_output(compiled(**kwargs))
    report = drad.report(compiled)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    assert {site.path for site in report.replaced} == {"blocks.0.attn1", "blocks.1.attn1"}
    with masked_dense(report.replaced[0].plan):
        assert relative_error(out, first_output(model(**kwargs))) < 1e-5


def test_diffusers_model_that_is_trained():
    model, kwargs, expected = make("wan_t2v")
    model.enable_gradient_checkpointing()
    model.train()
    weights = [p for p in model.blocks.parameters() if p.requires_grad]
    want = torch.autograd.grad(first_output(model(**kwargs)).square().sum(), weights)
    options = {**OPTIONS, "sparsity": 0.0, "inner": "aot_eager"}
    compiled = torch.compile(model, backend="dynamicrad", options=options, fullgraph=True)
    got = torch.autograd.grad(first_output(compiled(**kwargs)).square().sum(), weights)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-4
    video = [site for site in drad.report(compiled).sites if site.role == "video_self_attention"]
    assert len(video) == expected["n_video_self_attn_nodes"]
    assert all(site.replaced for site in video)


def test_trained_with_symbolic_sizes():
    """The plan is then made inside the first checkpoint, and is one of its outputs."""
    model = Layers(checkpointed)
    options = {**OPTIONS, "sparsity": 0.0, "inner": "aot_eager"}
    compiled = torch.compile(model, backend="dynamicrad", fullgraph=True, dynamic=True, options=options)
    weights = list(model.parameters())
    for frames in (4, 6):
        latents = torch.randn(1, 3, frames, 6, 10)
        want = torch.autograd.grad(model(latents).square().sum(), weights)
        got = torch.autograd.grad(compiled(latents).square().sum(), weights)
        assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-4
    report = drad.report(compiled)
    assert len(report.replaced) == 2
    assert "made when the graph runs" in report.summary()
