"""Every spelling of attention: found, replaced, and equal to dense attention under the plan's block mask."""

from __future__ import annotations

import pytest
import torch
from support.graphs import compile_sparse, drad, relative_error
from support.plain import PLAIN
from support.spellings import SPELLINGS, eager_sdpa, masked, scores_upcast, upcast
from support.tiny_dit import (
    HEADS,
    KEEP,
    LATENTS,
    OP,
    SCALE,
    TinyDiT,
    check_sparse,
    dense_attention,
    plan_everything,
    run_rewritten,
    sparse_plan,
    token_mask,
)  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    attend, layout = SPELLINGS[name]
    check_sparse(
        TinyDiT(attend, layout, kv_heads=1 if name in ("sdpa-gqa", "einsum-shared-key-head") else HEADS),
        scale=0.3 if name in ("sdpa-scale", "flex-scale") else SCALE,
        keep=KEEP if "mask" in name or "padding" in name else None,
    )


def padded_both_ways(q, k, v):
    """Padding hides tokens as keys and as queries; rows without a key are 0."""
    keep = KEEP[:, None, None].repeat(1, 1, 60, 1)
    return eager_sdpa(q, k, v, attn_mask=(keep & keep.transpose(2, 3)).bool().contiguous())


def test_mask_of_padded_queries_and_keys():
    model, plan = TinyDiT(padded_both_ways), sparse_plan()
    kept, site, _ = run_rewritten(model, (LATENTS,), plan_everything)
    assert site.replaced, site.reason
    sparse, _, _ = run_rewritten(model, (LATENTS,), lambda site: plan)
    with torch.no_grad():
        expected = dense_attention(*model.operands(LATENTS), token_mask(plan), keep=KEEP).transpose(1, 2)
        assert relative_error(kept, model(LATENTS)) < 1e-5
    assert relative_error(sparse, expected.masked_fill(~KEEP[:, None, :, None], 0)) < 1e-5
    assert not sparse[0, :, 57:].any()


HALF = {
    "sdpa": (eager_sdpa, torch.bfloat16),
    "upcast": (upcast, torch.bfloat16),
    "scores-upcast": (scores_upcast, torch.float16),
    "float-queries": (lambda q, k, v: soft_upcast(q.float().sin(), k.float(), v), torch.bfloat16),
}


def soft_upcast(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("name", HALF)
def test_half_precision(name):
    attend, dtype = HALF[name]
    model = TinyDiT(attend).to(dtype)
    latents = LATENTS.to(dtype)
    out, site, gm = run_rewritten(model, (latents,), plan_everything)
    assert site.replaced, site.reason
    with torch.no_grad():
        eager = model(latents)
    assert out.dtype == eager.dtype
    assert relative_error(out, eager) < 2e-2  # bfloat16 rounds to 2^-8
    operand = next(node for node in gm.graph.nodes if str(node.target) == OP).args[0]
    assert operand.op != "call_method" or operand.target not in ("float", "to")  # no needless upcast before the op


@pytest.mark.parametrize("attend", [eager_sdpa, soft_upcast], ids=["sdpa", "matmul"])
def test_autocast(attend):
    """Operands stay float32 in the graph; what is computed from them under autocast is bfloat16."""

    class Cast(TinyDiT):
        def forward(self, latents):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(latents)

    model = Cast(lambda q, k, v: attend(q.float(), k.float(), v))
    out, site, _ = run_rewritten(model, (LATENTS,), plan_everything)
    assert site.replaced, site.reason
    with torch.no_grad():
        eager = model(LATENTS)
    assert out.dtype == eager.dtype == torch.bfloat16
    assert relative_error(out, eager) < 2e-2


@pytest.mark.parametrize("name", ["matmul-3d", "einsum", "keys-first"])
def test_dynamic_frames(name):
    """Plans are made when the graph runs, whatever the layout."""
    attend, layout = SPELLINGS[name]
    model = TinyDiT(attend, layout)
    compiled = compile_sparse(model, sparsity=0.5)
    for frames in (4, 7):
        latents = torch.randn(2, 3, frames, 6, 10)
        torch._dynamo.mark_dynamic(latents, 2)
        with torch.no_grad():
            out, operands = compiled(latents), model.operands(latents)
        plan = drad.make_plan("dynamicrad", (frames, 3, 5), 16, sparsity=0.5, regime="mid", profile=PLAIN)
        expected = dense_attention(*operands, token_mask(plan))
        expected = expected if layout == "bshd" else expected.transpose(1, 2)
        assert relative_error(out, expected.reshape(out.shape)) < 1e-5
    report = drad.report(compiled)
    assert len(report.graphs) == 1
    assert len(report.replaced) == 1


@pytest.mark.parametrize("name", ["sdpa", "matmul-3d", "einsum", "mask-added", "flex"])
def test_dynamic_batch(name):
    attend, layout = SPELLINGS[name]
    if name == "mask-added":  # a mask of any batch
        attend = lambda q, k, v: masked(q, k, v, lambda s: s.masked_fill(torch.arange(60) > 50, -1e9))  # noqa: E731
    model = TinyDiT(attend, layout)
    latents = torch.cat([LATENTS, LATENTS[:1]])
    torch._dynamo.mark_dynamic(latents, 0)
    out, site, _ = run_rewritten(model, (latents,), plan_everything)
    assert site.replaced, site.reason
    with torch.no_grad():
        assert relative_error(out, model(latents)) < 1e-5
