"""Every spelling of attention that is recognised: SPELLINGS, name -> (attend, layout of TinyDiT)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from support.tiny_dit import (
    DIM,
    HEADS,
    KEEP,
    SCALE,
)  # fmt: skip


def eager_sdpa(q, k, v, **how):
    return F.scaled_dot_product_attention(q, k, v, **how)


def in_context(q, k, v):
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        return F.scaled_dot_product_attention(q, k, v)


def upcast(q, k, v):
    scores = (q.float() * SCALE) @ k.float().transpose(-2, -1)
    return F.dropout(scores.softmax(-1).to(v.dtype), 0.0, training=False) @ v


def scores_upcast(q, k, v):
    return F.softmax(q @ k.mT / math.sqrt(DIM), dim=-1, dtype=torch.float32).type_as(v) @ v


def both_scaled(q, k, v):
    q, k = q * DIM**-0.25, k / DIM**0.25
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), v)


def tensor_scale(q, k, v):
    return ((q @ k.transpose(2, 3)) / torch.sqrt(torch.tensor(float(DIM)))).softmax(-1) @ v


def documented(q, k, v, is_causal=False):
    """The equivalent of scaled_dot_product_attention in its documentation."""
    bias = torch.zeros(q.size(-2), k.size(-2), dtype=q.dtype)
    if is_causal:
        bias.masked_fill_(torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril().logical_not(), float("-inf"))
    weights = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.size(-1)))
    weights += bias
    weights = torch.dropout(torch.softmax(weights, dim=-1), 0.0, train=True)
    return weights @ v


def in_place(q, k, v):
    scores = q @ k.transpose(-1, -2)
    scores *= SCALE
    scores += 0.5
    return F.dropout(torch.softmax(scores, dim=3), 0.3, training=False) @ v


def one_head_at_a_time_layout(q, k, v):
    """Scores go through [B * H, S, S] and back."""
    b, h, s, _ = q.shape
    scores = torch.bmm(q.reshape(b * h, s, -1), k.reshape(b * h, s, -1).transpose(1, 2)) * SCALE
    scores = scores.view(b, h, s, s).view(b * h, s, s)
    return torch.bmm(scores.softmax(-1), v.reshape(b * h, s, -1)).view(b, h, s, -1)


def keys_first(q, k, v):
    """Features first, as in convolutional attention blocks: softmax(q^T k), then v weights^T."""
    weights = (torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(dim=2)
    return torch.bmm(v.transpose(1, 2), weights.permute(0, 2, 1)).transpose(1, 2)


def baddbmm(q, k, v):
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
    return torch.bmm(torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=SCALE).softmax(-1), v)


def einsum(q, k, v):
    weights = torch.einsum("bqhd,bkhd->bhqk", q * SCALE, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def einsum_swapped(q, k, v):
    weights = torch.einsum("b k h d, b q h d -> b h k q", k, q).mul(SCALE).softmax(-2)
    return torch.einsum("...kq,...kd->...qd", weights, v.transpose(1, 2)).transpose(1, 2)


def einsum_queries_before_heads(q, k, v):
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bqhk", q, k) * SCALE, dim=-1)
    return torch.einsum("bqhk,bhkd->bhqd", weights, v)


def shared_key_head(q, k, v):
    k, v = k[:, :, 0], v[:, :, 0]
    return torch.einsum("bhqk,bkd->bqhd", torch.einsum("bqhd,bkd->bhqk", q, k).mul(SCALE).softmax(-1), v)


def masked(q, k, v, apply):
    return apply(q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v


MASKS = {
    "masked-fill": lambda s: s.masked_fill(~KEEP[:, None, None], float("-inf")),
    "masked-fill-min": lambda s: s.masked_fill(KEEP[:, None, None] == 0, torch.finfo(s.dtype).min),
    "where": lambda s: torch.where(KEEP[:, None, None], s, -1e9),
    "where-hidden": lambda s: torch.where(~KEEP[:, None, None, :], -math.inf, s),
    "added": lambda s: s + torch.zeros(2, 60).masked_fill(~KEEP, -math.inf)[:, None, None],
    "added-in-place": lambda s: s.add_(torch.zeros(2, 60).masked_fill_(~KEEP, -math.inf)[:, None, None, :]),
    "added-product": lambda s: s + ((1 - KEEP.float()) * -10000.0).unsqueeze(1).unsqueeze(1),
    "added-where": lambda s: torch.where(KEEP, 0.0, -math.inf)[:, None, None].expand(-1, HEADS, 60, -1) + s,
    "repeated": lambda s: s + (~KEEP).to(s.dtype).mul(-1e4).repeat_interleave(HEADS, 0).view(2, HEADS, -1, 60),
}  # fmt: skip


SPELLINGS = {
    "sdpa": (eager_sdpa, "bhsd"),
    "sdpa-kernel": (in_context, "bhsd"),
    "sdpa-scale": (lambda q, k, v: eager_sdpa(q, k, v, scale=0.3), "bhsd"),
    "sdpa-gqa": (lambda q, k, v: eager_sdpa(q, k, v, enable_gqa=True), "bhsd"),
    "sdpa-3d": (eager_sdpa, "nsd"),
    "sdpa-key-padding": (lambda q, k, v: eager_sdpa(q, k, v, attn_mask=KEEP[:, None, None]), "bhsd"),
    "sdpa-key-padding-expanded": (
        lambda q, k, v: eager_sdpa(q, k, v, attn_mask=KEEP[:, None, None].expand(2, HEADS, 60, 60)),
        "bhsd",
    ),
    "sdpa-float-mask": (
        lambda q, k, v: eager_sdpa(q, k, v, attn_mask=torch.zeros(2, 1, 1, 60).masked_fill(~KEEP[:, None, None], -1e5)),
        "bhsd",
    ),
    "matmul": (lambda q, k, v: (q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v, "bhsd"),
    "documented": (documented, "bhsd"),
    "matmul-3d": (lambda q, k, v: (q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v, "nsd"),
    "upcast": (upcast, "bhsd"),
    "scores-upcast": (scores_upcast, "bhsd"),
    "both-scaled": (both_scaled, "bhsd"),
    "tensor-scale": (tensor_scale, "bhsd"),
    "in-place": (in_place, "bhsd"),
    "bmm": (lambda q, k, v: torch.bmm(F.softmax(torch.bmm(SCALE * q, k.mT), -1), v), "nsd"),
    "bmm-there-and-back": (one_head_at_a_time_layout, "bhsd"),
    "keys-first": (keys_first, "nsd"),
    "baddbmm": (baddbmm, "nsd"),
    "einsum": (einsum, "bshd"),
    "einsum-swapped": (einsum_swapped, "bshd"),
    "einsum-bqhk": (einsum_queries_before_heads, "bhsd"),
    "einsum-shared-key-head": (shared_key_head, "bshd"),
    "flex": (lambda q, k, v: flex_attention(q, k, v), "bhsd"),
    "flex-scale": (lambda q, k, v: flex_attention(q, k, v, scale=0.3), "bhsd"),
    **{f"mask-{name}": (lambda q, k, v, m=m: masked(q, k, v, m), "bhsd") for name, m in MASKS.items()},
}
