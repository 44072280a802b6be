"""A tiny video transformer with one attention of any spelling, and the check that a sparse plan keeps it exact."""

from __future__ import annotations

import math

import torch
from torch import nn

import dynamicrad_compile as drad
from dynamicrad_compile.passes import PassContext, run_passes
from support.graphs import plan_each, relative_error, targets
from support.plain import PLAIN

OP = "dynamicrad.block_sparse_attention.default"
GRID = (4, 3, 5)
LATENTS = torch.randn(2, 3, 4, 6, 10, generator=torch.Generator().manual_seed(1))  # 2 x (4 x 3 x 5 = 60 tokens)
HEADS, DIM = 2, 16
SCALE = DIM**-0.5
KEEP = torch.arange(60) < torch.tensor([[57], [60]])  # bool [B, S]: padding in the first sample


class TinyDiT(nn.Module):
    """A patch embedding and one attention `attend(q, k, v)`; returns what attend makes of it.

    layout: "bhsd", "bshd", "nsd" (heads in the batch) or "thd" (batch and tokens packed).
    """

    def __init__(self, attend=None, layout="bhsd", kv_heads=HEADS):
        super().__init__()
        self.attend, self.layout = attend, layout
        self.patch = nn.Conv3d(3, HEADS * DIM, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(HEADS * DIM, (HEADS + 2 * kv_heads) * DIM)
        self.widths = [HEADS * DIM, kv_heads * DIM, kv_heads * DIM]

    def tokens(self, latents):
        return self.patch(latents).flatten(2).transpose(1, 2)

    def operands(self, latents):
        """Query, key and value [B, S, heads, D]."""
        return [y.unflatten(-1, (-1, DIM)) for y in self.qkv(self.tokens(latents)).split(self.widths, -1)]

    def forward(self, latents):
        operands = self.operands(latents)
        if self.layout in ("bhsd", "nsd"):
            operands = [y.transpose(1, 2) for y in operands]
        if self.layout in ("nsd", "thd"):
            operands = [y.flatten(0, 1) for y in operands]
        return self.attend(*operands)


def plan_everything(site):
    return drad.make_plan("dense", site.grid, 16, *site.text)


def sparse_plan():
    plan = drad.make_plan("dynamicrad", GRID, 16, sparsity=0.5, regime="mid", profile=PLAIN)
    assert plan.sparsity > 0.2
    return plan


def run_rewritten(model, inputs, build_plan, **how):
    """(output, site, graph module) of a model with one attention, captured and rewritten."""
    torch._dynamo.reset()
    found = []

    def backend(gm, example_inputs):
        context = PassContext(plan_each(build_plan))
        run_passes(gm, context)
        found.append((context, gm))
        return gm.forward

    with torch.no_grad():
        out = torch.compile(model, backend=backend, fullgraph=True, **how)(*inputs)
    ((context, gm),) = found
    (site,) = context.sites
    return out, site, gm


def dense_attention(q, k, v, allowed, scale=SCALE, keep=None):
    """Attention of q, k, v [B, S, H, D] under a bool [S, S], and keys under a bool [B, S], in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT * scale).masked_fill(~allowed, -math.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def token_mask(plan):
    """Bool [S, S] of a plan."""
    rows = torch.arange(plan.q_len) // plan.block_q
    return plan.block_mask()[0, 0][rows][:, torch.arange(plan.kv_len) // plan.block_kv]


def check_sparse(model, latents=LATENTS, scale=SCALE, keep=None, tolerance=1e-5):
    """The model equals eager under a plan that keeps everything, and masked dense attention under a sparse one."""
    plan = sparse_plan()
    kept, site, gm = run_rewritten(model, (latents,), plan_everything)
    assert site.replaced, (site.role, site.reason)
    assert (site.kv_length, site.grid) == (60, GRID)
    assert targets(gm).count(OP) == 1
    assert not any("softmax" in t or ("attention" in t and t != OP) for t in targets(gm)), targets(gm)
    sparse, _, _ = run_rewritten(model, (latents,), lambda site: plan)
    with torch.no_grad():
        eager, operands = model(latents), model.operands(latents)
    assert (kept.shape, kept.stride(), kept.dtype) == (eager.shape, eager.stride(), eager.dtype)
    assert relative_error(kept, eager) < tolerance
    expected = dense_attention(*operands, token_mask(plan), scale, keep)
    if model.layout in ("bhsd", "nsd"):
        expected = expected.transpose(1, 2)
    assert relative_error(sparse, expected.reshape(eager.shape)) < tolerance
    assert relative_error(sparse, eager) > 1e-2
