"""Slow fp64 reference of block-sparse attention: a dense masked softmax. For tests and for reading.

With compensation the softmax runs over [all keys | the mean key of each block], the latter masked where the row
keeps the block.
"""

from __future__ import annotations

import torch


def kept_blocks(kv_counts: torch.Tensor, kv_indices: torch.Tensor, m_k: int) -> torch.Tensor:
    """bool [B', H', Mq, Mk] of counts [B', H', Mq] and indices [B', H', Mq, W]: True where a block is active."""
    width = kv_indices.shape[-1]
    active = torch.arange(width, device=kv_counts.device) < kv_counts[..., None]
    mask = torch.zeros(*kv_counts.shape, m_k + 1, dtype=torch.bool, device=kv_counts.device)
    mask.scatter_(-1, torch.where(active, kv_indices, m_k).long(), True)
    return mask[..., :m_k] | (kv_counts >= m_k)[..., None]


def token_mask(
    kv_counts: torch.Tensor, kv_indices: torch.Tensor, block_q: int, block_kv: int, q_len: int, kv_len: int
) -> torch.Tensor:
    """bool [B', H', Sq, Sk] of counts [B', H', Mq] and indices [B', H', Mq, W]: True where a pair is active."""
    blocks = kept_blocks(kv_counts, kv_indices, -(-kv_len // block_kv))
    return blocks.repeat_interleave(block_q, -2)[..., :q_len, :].repeat_interleave(block_kv, -1)[..., :kv_len]


def block_means(x: torch.Tensor, block: int, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(means fp64 [B, H, M, D], counts int64 [B, M]) of the blocks of x [B, H, S, D]; valid bool [B, S]."""
    means, counts = [], []
    for start in range(0, x.shape[2], block):
        own = valid[:, start : start + block]
        counts.append(own.sum(-1))
        total = x[:, :, start : start + block].double().masked_fill(~own[:, None, :, None], 0.0).sum(2)
        means.append(total / counts[-1].clamp(min=1)[:, None, None])
    return torch.stack(means, 2), torch.stack(counts, 1)


def _attend(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of scores [B, H, Sq, N], -inf where hidden, and values [B, H, N, D]."""
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(torch.isneginf(lse)[..., None], 0.0, torch.exp(scores - lse[..., None]))
    return weights @ values, lse


def _dropped_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: tuple[torch.Tensor, torch.Tensor, float, int, int],
    kv_mask: torch.Tensor | None,
    compensate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores fp64 [B, H, Sq, Mk], -inf for kept blocks, mean values fp64 [B, H, Mk, D]); k, v [B, H, Sk, D]."""
    kv_counts, kv_indices, scale, block_q, block_kv = plan
    valid = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if kv_mask is None else kv_mask
    mean_k, count = block_means(k, block_kv, valid.expand(q.shape[0], -1))
    mean_v, _ = block_means(v, block_kv, valid.expand(q.shape[0], -1))
    mean_k, mean_v = (x.to(q.dtype).double() for x in (mean_k, mean_v))  # as the op rounds them
    scores = q.double() @ mean_k.transpose(-1, -2) * scale
    mass = (count * compensate.double()[:, None])[:, None, None, :]
    kept = kept_blocks(kv_counts, kv_indices, mean_k.shape[2]).repeat_interleave(block_q, -2)[..., : q.shape[2], :]
    return (scores + mass.log()).masked_fill(kept | (mass == 0), float("-inf")), mean_v


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
    compensate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out fp64 [B, H, Sq, D], lse fp64 [B, H, Sq]) of the op's arguments; memory is O(B H Sq Sk)."""
    heads, q_len, dim = q.shape[1:]
    scale = dim**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    mask = token_mask(kv_counts, kv_indices, block_q, block_kv, q_len, k.shape[2])
    if kv_mask is not None:
        mask = mask & kv_mask[:, None, None, :]
    values = v.double()
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    if compensate is not None:
        extra, means = _dropped_means(q, k, v, (kv_counts, kv_indices, scale, block_q, block_kv), kv_mask, compensate)
        scores, values = torch.cat((scores, extra), -1), torch.cat((values, means), 2)
    return _attend(scores, values)


def means_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_counts: torch.Tensor,
    kv_indices: torch.Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: torch.Tensor | None,
    compensate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out fp64 [B, H, Sq, D], lse fp64 [B, H, Sq]) of the arguments of `means_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return _attend(*_dropped_means(q, k, v, (kv_counts, kv_indices, scale, block_q, block_kv), kv_mask, compensate))
