"""nn.MultiheadAttention, as Dynamo keeps it and as an exported program spells it out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.graphs import capture, relative_error, sites_of, targets
from support.tiny_dit import (
    DIM,
    HEADS,
    KEEP,
    LATENTS,
    OP,
    TinyDiT,
    plan_everything,
    run_rewritten,
    sparse_plan,
    token_mask,
)
from torch import nn


class MultiheadDiT(TinyDiT):
    """A patch embedding and nn.MultiheadAttention; `how` goes to its call."""

    def __init__(self, batch_first=True, built=None, keep=None, use=lambda out, weights: out, **how):
        super().__init__()
        self.batch_first, self.keep, self.use, self.how = batch_first, keep, use, {"need_weights": False, **how}
        built = {"batch_first": batch_first, **(built or {})}
        self.attention = nn.MultiheadAttention(HEADS * DIM, HEADS, **built).eval()

    def forward(self, latents):
        x = self.tokens(latents)
        x = x if self.batch_first else x.transpose(0, 1)
        padding = {} if self.keep is None else {"key_padding_mask": ~self.keep}
        out = self.use(*self.attention(x, x, x, **padding, **self.how))
        return out if self.batch_first else out.transpose(0, 1)

    def reference(self, latents, allowed):
        """Dense attention under a bool [S, S], in float64."""
        inner = self.attention.double()
        x = self.tokens(latents).double()
        q, k, v = F.linear(x, inner.in_proj_weight, inner.in_proj_bias).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.mT / math.sqrt(DIM)).masked_fill(~allowed, -math.inf)
        if self.keep is not None:
            scores = scores.masked_fill(~self.keep[:, None, None], -math.inf)
        return inner.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


REPLACED = {
    "batch-first": {},
    "sequence-first": dict(batch_first=False),
    "no-bias": dict(built=dict(bias=False)),
    "key-padding": dict(keep=KEEP),
    "unused-weights": dict(need_weights=True),
    "dropout-in-eval": dict(built=dict(dropout=0.3)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_replaced(name):
    model = MultiheadDiT(**REPLACED[name])
    plan = sparse_plan()
    kept, site, gm = run_rewritten(model, (LATENTS,), plan_everything)
    assert site.replaced, (site.role, site.reason)
    assert (site.q_shape, site.kv_length) == ((2, HEADS, 60, DIM), 60)
    assert targets(gm).count(OP) == 1
    assert not any("multi_head" in target for target in targets(gm))
    sparse, _, _ = run_rewritten(model, (LATENTS,), lambda site: plan)
    with torch.no_grad():
        eager = model(LATENTS)
        assert kept.shape == eager.shape
        assert relative_error(kept, eager) < 1e-5
        assert relative_error(sparse, model.reference(LATENTS, token_mask(plan))) < 1e-5
        assert relative_error(sparse, kept) > 1e-2


DENSE = {
    "weights": (dict(need_weights=True, use=lambda out, weights: out * weights.sum()), "mha_weights_used"),
    "zero-key": (dict(built=dict(add_zero_attn=True)), "mha_zero_key"),
    "learned-key": (dict(built=dict(add_bias_kv=True)), "mha_learned_key"),
    "other-width": (dict(built=dict(kdim=HEADS * DIM, vdim=HEADS * DIM)), None),
    "mask": (dict(attn_mask=torch.eye(60) > 0), "mask_differs"),
    "causal": (dict(attn_mask=torch.ones(60, 60).triu(1) > 0, is_causal=True), "causal"),
    "two-masks": (dict(attn_mask=torch.eye(60) > 0, keep=KEEP), "mha_two_masks"),
}


@pytest.mark.parametrize("name", DENSE)
def test_left_dense_with_a_reason(name):
    how, code = DENSE[name]
    ((context, gm),) = capture(MultiheadDiT(**how), LATENTS, build_plan=plan_everything)
    (site,) = context.sites
    if code is None:
        assert site.replaced
        return
    assert site.reason.code == code
    assert not site.replaced
    assert OP not in targets(gm)


def test_cross_attention_is_told_apart():
    class Cross(MultiheadDiT):
        def forward(self, latents, text):
            return self.attention(self.tokens(latents), text, text, need_weights=False)[0]

    (site,) = sites_of(capture(Cross(), LATENTS, torch.randn(2, 7, HEADS * DIM), build_plan=plan_everything))
    assert site.role == "cross_attention"
    assert site.kv_length == 7
