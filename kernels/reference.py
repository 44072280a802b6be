"""Slow fp64 reference of block-sparse attention: a dense masked softmax. For tests and for reading."""

from __future__ import annotations

import torch


def token_mask(
    kv_counts: torch.Tensor, kv_indices: torch.Tensor, block_q: int, block_kv: int, q_len: int, kv_len: int
) -> torch.Tensor:
    """bool [B', H', Sq, Sk] of counts [B', H', Mq] and indices [B', H', Mq, W]: True where a pair is active."""
    m_k = -(-kv_len // block_kv)
    width = kv_indices.shape[-1]
    active = torch.arange(width, device=kv_counts.device) < kv_counts[..., None]
    mask = torch.zeros(*kv_counts.shape, m_k + 1, dtype=torch.bool, device=kv_counts.device)
    mask.scatter_(-1, torch.where(active, kv_indices, m_k).long(), True)
    blocks = mask[..., :m_k] | (kv_counts >= m_k)[..., None]
    return blocks.repeat_interleave(block_q, -2)[..., :q_len, :].repeat_interleave(block_kv, -1)[..., :kv_len]


def block_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_counts: torch.Tensor,
    kv_indices: torch.Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out fp64 [B, H, Sq, D], lse fp64 [B, H, Sq]) of the op's arguments; memory is O(B H Sq Sk)."""
    heads, dim = q.shape[1], q.shape[-1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    mask = token_mask(kv_counts, kv_indices, block_q, block_kv, q.shape[2], k.shape[2])
    if kv_mask is not None:
        mask = mask & kv_mask[:, None, None, :]
    scores = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(torch.isneginf(lse)[..., None], 0.0, torch.exp(scores - lse[..., None]))
    return weights @ v, lse
