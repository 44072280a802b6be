"""What is an attention and what only looks like one; what is found but stays dense, and the reason given."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.graphs import capture, sites_of, targets
from support.spellings import documented
from support.tiny_dit import DIM, HEADS, LATENTS, OP, SCALE, TinyDiT, plan_everything
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def soft(scores):
    return scores.softmax(-1)


def scores(q, k):
    return q @ k.transpose(-1, -2) * SCALE


NEAR_MISSES = {
    "linear": lambda q, k, v: q @ (k.transpose(-1, -2) @ v),
    "linear-softmaxed": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v),
    "other-dim": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "over-heads": lambda q, k, v: scores(q, k).softmax(1) @ v,
    "log-softmax": lambda q, k, v: scores(q, k).log_softmax(-1) @ v,
    "sigmoid": lambda q, k, v: scores(q, k).sigmoid() @ v,
    "norm-between": lambda q, k, v: F.layer_norm(soft(scores(q, k)), (60,)) @ v,
    "gate-between": lambda q, k, v: (soft(scores(q, k)) * q[..., :1].sigmoid()) @ v,
    "scaled-probabilities": lambda q, k, v: (soft(scores(q, k)) * 2) @ v,
    "differential": lambda q, k, v: (soft(scores(q, k)) - 0.3 * soft(scores(k, q))) @ v,
    "sink": lambda q, k, v: soft(F.pad(scores(q, k), (0, 1)))[..., :-1] @ v,
    "two-softmaxes": lambda q, k, v: soft(soft(scores(q, k))) @ v,
    "softcap": lambda q, k, v: soft(torch.tanh(scores(q, k) / 30) * 30) @ v,
    "learned-temperature": lambda q, k, v: soft(F.normalize(q) @ F.normalize(k).mT * q.mean().exp()) @ v,
    "transposed-probabilities": lambda q, k, v: soft(scores(q, k)).transpose(-1, -2) @ v,
    "dropout-before-softmax": lambda q, k, v: soft(F.dropout(scores(q, k), 0.0)) @ v,
    "router": lambda q, k, v: soft(q @ torch.ones(DIM, 5)) @ torch.ones(5, DIM),
    "outer-product": lambda q, k, v: soft(torch.einsum("bhqd,bhkd->bhqkd", q, k).sum(-1)) @ v,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_no_attention(name):
    captured = capture(TinyDiT(NEAR_MISSES[name]), LATENTS, build_plan=plan_everything)
    assert captured
    assert not sites_of(captured)
    assert not any("dynamicrad" in target for _, gm in captured for target in targets(gm))


def returned_map(q, k, v):
    weights = soft(scores(q, k))
    return weights @ v + weights.mean()


def used_scores(q, k, v):
    raw = scores(q, k)
    return soft(raw) @ v + raw.amax()


def changed_in_place(q, k, v):
    weights = soft(scores(q, k))
    k.zero_()
    return weights @ v


def patched_mask(q, k, v):
    """One query may see other keys: an expanded mask is written to."""
    keep = (torch.arange(60) < 50)[None, None, None].repeat(2, 1, 60, 1)
    keep[:, :, 7, 3] = q[:, :1, 7, 3] > 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def block_masked(q, k, v):
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 60, 60, device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def mask_of_another_kind(fill):
    return lambda q, k, v: soft(scores(q, k).masked_fill(torch.arange(60) > 50, fill)) @ v


def causal(q, k, v):
    return soft(scores(q, k) + torch.full((60, 60), -math.inf).triu(1)) @ v


def windowed(q, k, v):
    q, k, v = (x.unflatten(2, (2, 30)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def windowed_unfused(q, k, v):
    """[B, windows, H, S, D], with windows of 2 x 3 x 5 tokens."""
    q, k, v = (x.unflatten(2, (2, 30)).transpose(1, 2) for x in (q, k, v))
    return soft(scores(q, k)) @ v


def split_frames(x):
    return x.unflatten(2, (4, 15))


def spatial(q, k, v):
    q, k, v = (split_frames(x).transpose(1, 2).flatten(0, 2) for x in (q, k, v))
    return soft(scores(q, k)) @ v


def temporal(q, k, v):
    q, k, v = (split_frames(x).permute(0, 3, 1, 2, 4).flatten(0, 2) for x in (q, k, v))
    return torch.bmm(soft(torch.baddbmm(torch.zeros(1), q, k.mT, alpha=SCALE)), v)


def cross(q, k, v):
    text = torch.ones(2, HEADS, 7, DIM)
    return soft(scores(q, text)) @ text


def learned_memory(q, k, v):
    return soft(scores(q, torch.ones(1, HEADS, 60, DIM))) @ v


DENSE = {
    "returned-map": (returned_map, "scores_used_elsewhere"),
    "used-scores": (used_scores, "scores_used_elsewhere"),
    "position-bias": (lambda q, k, v: soft(scores(q, k) + torch.eye(60)) @ v, "additive_mask"),
    "head-bias": (lambda q, k, v: soft(scores(q, k) + torch.rand(HEADS, 1, 1)) @ v, "additive_mask"),
    "decomposed-bias": (lambda q, k, v: soft(scores(q, k) + q @ v.mT) @ v, "additive_mask"),
    "unknown-float-mask": (lambda q, k, v: soft(scores(q, k) + q[:, :1, :, 0].unsqueeze(1)) @ v, "additive_mask"),
    "weak-mask": (mask_of_another_kind(-5.0), "mask_fills_in"),
    "query-mask": (
        lambda q, k, v: soft(scores(q, k).masked_fill((torch.arange(60) > 9)[:, None], -1e9)) @ v,
        "mask_not_over_keys",
    ),
    "patched-mask": (patched_mask, "mask_differs"),
    "two-masks": (
        lambda q, k, v: soft(scores(q, k).masked_fill(torch.arange(60) > 50, -1e9) + torch.eye(60)) @ v,
        "several_masks",
    ),
    "scaled-after-mask": (
        lambda q, k, v: soft((q @ k.mT).masked_fill(torch.arange(60) > 50, -1e9) * SCALE) @ v,
        "scaled_after_mask",
    ),
    "negative-scale": (lambda q, k, v: soft(q @ k.mT * -1.0) @ v, "scale"),
    "dropout": (lambda q, k, v: F.dropout(soft(scores(q, k)), 0.2) @ v, "dropout"),
    "changed-in-place": (changed_in_place, "write_while_computed"),
    "causal": (causal, "mask_groups"),
    "causal-documented": (lambda q, k, v: documented(q, k, v, is_causal=True), "mask_groups"),
    "causal-sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal"),
    "double": (lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()), "dtype"),
    "other-head-dim": (lambda q, k, v: soft(scores(q, k)) @ v[..., :5], "value_head_dim"),
    "broadcast-values": (lambda q, k, v: soft(scores(q, k)) @ v[:1], "batch"),
    "flex-block-mask": (block_masked, "block_mask"),
    "flex-score-mod": (lambda q, k, v: flex_attention(q, k, v, lambda s, *_: s + 1), "score_mod"),
    "flex-lse": (lambda q, k, v: flex_attention(q, k, v, return_lse=True)[1], "more_outputs"),
    "windows": (windowed, "windowed"),
    "windows-unfused": (windowed_unfused, "windowed"),
    "spatial": (spatial, "frames_in_batch"),
    "temporal": (temporal, "places_in_batch"),
    "cross": (cross, "other_tokens"),
    "learned-keys": (learned_memory, "other_tokens"),
}


@pytest.mark.parametrize("name", DENSE)
def test_found_but_left_dense_with_a_reason(name):
    attend, code = DENSE[name]
    ((context, gm),) = capture(TinyDiT(attend), LATENTS, build_plan=plan_everything)
    (site,) = context.sites
    assert site.reason.code == code
    assert not site.replaced
    assert OP not in targets(gm)
    assert site.q_shape is not None
    assert site.kv_length is not None


@pytest.mark.parametrize(
    ("attend", "role"),
    [(spatial, "spatial_attention"), (temporal, "temporal_attention"), (cross, "cross_attention"),
     (windowed, "self_attention"), (causal, "video_self_attention")],
    ids=["spatial", "temporal", "cross", "windowed", "causal"],
)  # fmt: skip
def test_roles_of_written_out_attention(attend, role):
    (site,) = sites_of(capture(TinyDiT(attend), LATENTS))
    assert site.role == role


def test_sites_are_in_graph_order_and_replaced_ones_feed_each_other():
    def three(q, k, v):
        x = soft(scores(q, k)) @ v
        x = F.scaled_dot_product_attention(x, x, x)
        return soft(scores(x, x)) @ x

    ((context, gm),) = capture(TinyDiT(three), LATENTS, build_plan=plan_everything)
    order = [node.name for node in gm.graph.nodes]
    assert len(context.sites) == 3
    assert all(site.replaced for site in context.sites)
    assert targets(gm).count(OP) == 3
    assert not any("matmul" in target for target in targets(gm))
    assert len(order) == len(set(order))


def test_encoder_layer_fast_path_names_the_switch():
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True).eval()

    class Encoder(TinyDiT):
        def forward(self, latents):
            return layer(self.patch(latents).flatten(2).transpose(1, 2))

    ((context, _),) = capture(Encoder(None), LATENTS, build_plan=plan_everything)
    assert context.sites[0].reason.code == "fused_encoder_layer"
    torch._dynamo.reset()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        ((context, _),) = capture(Encoder(None), LATENTS, build_plan=plan_everything)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert context.sites[0].replaced
