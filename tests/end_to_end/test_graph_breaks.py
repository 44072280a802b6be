"""Graph breaks: attention outside graphs is counted and named, that behind a break replaced where a grid is known."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_wan
from support.graphs import OPTIONS, call, make, masked_dense, relative_error
from support.marks import slow
from support.plain import PLAIN
from torch import nn

import dynamicrad_compile as drad
from dynamicrad_compile.errors import StrictError

CPU = torch.device("cpu")
SPARSE = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0}
PLAN = drad.make_plan("dynamicrad", (5, 6, 8), 16, sparsity=0.6, regime="mid", profile=PLAIN)


@torch.library.custom_op("drad_test::opaque_attention", mutates_args=())
def opaque_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention into which no compiler can look."""
    return F.scaled_dot_product_attention(q, k, v).contiguous()


@opaque_attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


class Disabled(transformer_wan.WanAttnProcessor):
    @torch.compiler.disable
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def disabled(model):
    for block in model.blocks:
        block.attn1.set_processor(Disabled())
        block.attn2.set_processor(Disabled())


def leaf_offload(model):
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def block_offload(model):
    model.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def wan(prepare):
    model, kwargs, _ = make("wan_t2v")
    prepare(model)
    return model, kwargs


OUTSIDE = [
    (
        disabled,
        r"outside every graph \(at attention_dispatch.py:\d+\).*graph break at transformer_wan.py:\d+ .*Disabled",
    ),
    slow(leaf_offload, r"outside every graph .*graph break at group_offloading.py:\d+ .*onload_"),
]


@pytest.mark.parametrize(("prepare", "why"), OUTSIDE)
def test_attention_outside_graphs_is_counted_and_the_break_named(prepare, why):
    model, kwargs = wan(prepare)
    compiled = torch.compile(model, backend="dynamicrad", options=SPARSE)
    for _ in range(2):  # the second call is not looked at
        call(compiled, kwargs)
        assert sys.getprofile() is None
        (note,) = drad.report(compiled).notes
        assert note.startswith("4 attention calls ran outside every graph")
    assert re.search(why, note)


@pytest.mark.parametrize("prepare", [disabled, slow(leaf_offload)])
def test_strict_raises_where_attention_would_run_outside(prepare):
    model, kwargs = wan(prepare)
    with pytest.raises(StrictError, match=r"strict=True, and an attention ran outside every graph .*graph break at"):
        call(torch.compile(model, backend="dynamicrad", options={**SPARSE, "strict": True}), kwargs)
    assert sys.getprofile() is None


def test_attention_inside_an_opaque_operation_is_told(monkeypatch):
    def attend(q, k, v, **_):
        return opaque_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", attend)
    model, kwargs = wan(lambda model: None)
    compiled = torch.compile(model, backend="dynamicrad", options=SPARSE)
    call(compiled, kwargs)
    assert "4 attention calls ran inside an operation of a graph" in drad.report(compiled).summary()
    torch._dynamo.reset()
    with pytest.raises(StrictError, match="inside an operation of a graph into which nothing can look"):
        call(torch.compile(model, backend="dynamicrad", options={**SPARSE, "strict": True}), kwargs)


@pytest.mark.slow
def test_attention_before_and_after_a_call_is_nobodys():
    """Neither attention of the caller nor that of another model is counted."""
    model, kwargs = wan(lambda model: None)
    compiled = torch.compile(model, backend="dynamicrad", options=SPARSE)
    q = torch.randn(1, 2, 16, 8)
    for _ in range(2):
        F.scaled_dot_product_attention(q, q, q)
        call(compiled, kwargs)
    F.scaled_dot_product_attention(q, q, q)
    assert "ran outside" not in drad.report(compiled).summary()


@pytest.mark.slow
def test_another_profiler_of_python_is_left_alone():
    model, kwargs = wan(disabled)
    events = []

    def profiler(frame, event, arg):
        events.append(event)

    sys.setprofile(profiler)
    try:
        call(torch.compile(model, backend="dynamicrad", options=SPARSE), kwargs)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("prepare", [casting, slow(block_offload)])
@pytest.mark.parametrize("how", [torch.compile, slow(drad.compile)])
@pytest.mark.parametrize("grid", [None, slow((5, 6, 8))])
def test_attention_behind_a_break_is_sparse_where_a_table_or_the_user_tells_the_grid(prepare, how, grid):
    model, kwargs = wan(prepare)
    options = {**SPARSE, "grid": grid, "strict": True}
    compiled = how(model, **options) if how is drad.compile else how(model, backend="dynamicrad", options=options)
    sparse, (eager, _) = call(compiled, kwargs), wan(prepare)
    with masked_dense(PLAN):
        assert relative_error(sparse, call(eager, kwargs)) < 1e-5
    assert {site.grid for site in drad.report(compiled).replaced} == {(5, 6, 8)}


class Broken(nn.Module):
    """A graph break between the projections and the attention, and no position table behind it."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(32, 96)

    def forward(self, latents):
        q, k, v = self.qkv(self.patch(latents).flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, 16)).unbind(2)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))


def test_queries_and_keys_from_other_graphs_are_no_prompt():
    latents = torch.randn(2, 3, 4, 6, 10)
    compiled = torch.compile(Broken(), backend="dynamicrad", options=SPARSE)
    call(compiled, {"latents": latents})
    (site,) = drad.report(compiled).sites
    assert (site.role, site.code) == ("unknown", "behind_graph_break")
    assert "graph break at test_graph_breaks.py:" in site.reason
    assert "`grid`" in site.advice
    torch._dynamo.reset()
    with pytest.raises(StrictError, match="come from other graphs"):
        call(torch.compile(Broken(), backend="dynamicrad", options={**SPARSE, "strict": True}), {"latents": latents})
    torch._dynamo.reset()
    given = torch.compile(Broken(), backend="dynamicrad", options={**SPARSE, "strict": True, "grid": (4, 3, 5)})
    call(given, {"latents": latents})
    assert [site.grid for site in drad.report(given).replaced] == [(4, 3, 5)]
