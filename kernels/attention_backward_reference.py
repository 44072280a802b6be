"""Slow fp64 reference of the backward of block-sparse attention, written from the formula. For tests, for reading.

With P = exp(S - lse), S = scale q k^T over the active pairs (Dao 2023, FlashAttention-2, section 2.3.2):

    dv = P^T do,  dS = P * (do v^T - rowsum(do * out) + dlse),  dq = scale dS k,  dk = scale dS^T q

A dropped block with compensation is one more key: the mean key with log(n) + log(compensate) added to its score.
Its gradient is shared equally by the n keys behind the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_arguments import Attention
from .attention_reference import block_means, kept_blocks, token_mask


def block_sparse_attention_backward_reference(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) fp64 of the op's arguments; out and lse are computed here. Memory is O(B H Sq Sk)."""
    a = Attention(q, k, v, *rest)
    dtype, (batch, heads, q_len, _), (kv_heads, kv_len) = k.dtype, q.shape, k.shape[1:3]
    scale, block_kv = a.factor, a.block_kv
    q, k, v, grad_out, grad_lse = (x.double() for x in (q, k, v, grad_out, grad_lse))
    usable = (
        torch.ones(batch, kv_len, dtype=torch.bool, device="cpu") if a.kv_mask is None else a.kv_mask.expand(batch, -1)
    )
    active = token_mask(a.kv_counts, a.kv_indices, a.block_q, block_kv, q_len, kv_len) & usable[:, None, None]
    bias = torch.where(active, 0.0, float("-inf")).double().expand(batch, heads, -1, -1)
    keys, values = k, v
    means, count = block_means(k, block_kv, usable)
    if a.compensate is not None:
        # Rounded as the op rounds them; where that matters is a test's business, so fp64 stays unrounded.
        mean_k, mean_v = (x.to(dtype).double() for x in (means, block_means(v, block_kv, usable)[0]))
        keys, values = torch.cat([k, mean_k], 2), torch.cat([v, mean_v], 2)
        dropped = ~kept_blocks(a.kv_counts, a.kv_indices, count.shape[1]).repeat_interleave(a.block_q, 2)[:, :, :q_len]
        extra = torch.log(count.double()) + torch.log(a.compensate.double())[:, None]  # [B, Mk]
        extra = torch.where(dropped, extra[:, None, None], float("-inf")).expand(batch, heads, -1, -1)
        bias = torch.cat([bias, extra], 3)
    group = heads // kv_heads
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (keys, values))

    scores = scale * q @ wide_k.transpose(-1, -2) + bias
    lse = torch.logsumexp(scores, -1, keepdim=True)
    p = torch.where(torch.isneginf(lse), 0.0, torch.exp(scores - lse))
    delta = (grad_out * (p @ wide_v)).sum(-1) - grad_lse
    ds = p * (grad_out @ wide_v.transpose(-1, -2) - delta[..., None])
    dq = scale * ds @ wide_k
    dk, dv = (
        x.unflatten(1, (kv_heads, group)).sum(2)
        for x in (scale * ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out)
    )
    if a.compensate is not None:
        share = usable.double() / count.clamp(min=1).repeat_interleave(block_kv, 1)[:, :kv_len]
        dk, dv = (
            x[:, :, :kv_len] + x[:, :, kv_len:].repeat_interleave(block_kv, 2)[:, :, :kv_len] * share[:, None, :, None]
            for x in (dk, dv)
        )
    return dq, dk, dv
