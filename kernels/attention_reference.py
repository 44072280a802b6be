"""Slow fp64 reference of block-sparse attention: a dense masked softmax. For tests and for reading.

With compensation the softmax runs over [all keys | the mean key of each block], the latter masked where the row
keeps the block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_arguments import Attention


def kept_blocks(kv_counts: Tensor, kv_indices: Tensor, m_k: int) -> Tensor:
    """bool [B', H', Mq, Mk] of counts [B', H', Mq] and indices [B', H', Mq, W]: True where a block is active."""
    width = kv_indices.shape[-1]
    active = torch.arange(width, device=kv_counts.device) < kv_counts[..., None]
    mask = torch.zeros(*kv_counts.shape, m_k + 1, dtype=torch.bool, device=kv_counts.device)
    ids = kv_indices.clamp(0, max(0, m_k - 1))  # as the kernels clamp what is out of range
    mask.scatter_(-1, torch.where(active, ids, m_k).long(), True)
    return mask[..., :m_k] | (kv_counts >= m_k)[..., None]


def token_mask(kv_counts: Tensor, kv_indices: Tensor, block_q: int, block_kv: int, q_len: int, kv_len: int) -> Tensor:
    """bool [B', H', Sq, Sk] of counts [B', H', Mq] and indices [B', H', Mq, W]: True where a pair is active."""
    blocks = kept_blocks(kv_counts, kv_indices, -(-kv_len // block_kv))
    return blocks.repeat_interleave(block_q, -2)[..., :q_len, :].repeat_interleave(block_kv, -1)[..., :kv_len]


def block_means(x: Tensor, block: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(means fp64 [B, H, M, D], counts int64 [B, M]) of the blocks of x [B, H, S, D]; valid bool [B, S]."""
    means, counts = [], []
    for start in range(0, x.shape[2], block):
        own = valid[:, start : start + block]
        counts.append(own.sum(-1))
        total = x[:, :, start : start + block].double().masked_fill(~own[:, None, :, None], 0.0).sum(2)
        means.append(total / counts[-1].clamp(min=1)[:, None, None])
    return torch.stack(means, 2), torch.stack(counts, 1)


def _attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of scores [B, H, Sq, N], -inf where hidden, and values [B, H, N, D]."""
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(torch.isneginf(lse)[..., None], 0.0, torch.exp(scores - lse[..., None]))
    return weights @ values, lse


def _operands(*args: Any, **kwargs: Any) -> Attention:
    """The op's arguments, with a key head for each query head."""
    a = Attention(*args, **kwargs)
    k, v = (x.repeat_interleave(a.q.shape[1] // x.shape[1], 1) for x in (a.k, a.v))
    return a._replace(k=k, v=v)


def _dropped_means(a: Attention, compensate: Tensor) -> tuple[Tensor, Tensor]:
    """(scores fp64 [B, H, Sq, Mk], -inf for kept blocks, mean values fp64 [B, H, Mk, D])."""
    valid = torch.ones(1, a.k.shape[2], dtype=torch.bool, device=a.k.device) if a.kv_mask is None else a.kv_mask
    mean_k, count = block_means(a.k, a.block_kv, valid.expand(a.q.shape[0], -1))
    mean_v, _ = block_means(a.v, a.block_kv, valid.expand(a.q.shape[0], -1))
    mean_k, mean_v = (x.to(a.q.dtype).double() for x in (mean_k, mean_v))  # as the op rounds them
    scores = a.q.double() @ mean_k.transpose(-1, -2) * a.factor
    mass = (count * compensate.double()[:, None])[:, None, None, :]
    kept = kept_blocks(a.kv_counts, a.kv_indices, mean_k.shape[2])
    kept = kept.repeat_interleave(a.block_q, -2)[..., : a.q.shape[2], :]
    return (scores + mass.log()).masked_fill(kept | (mass == 0), float("-inf")), mean_v


def block_sparse_attention_reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(out fp64 [B, H, Sq, D], lse fp64 [B, H, Sq]) of the op's arguments; memory is O(B H Sq Sk)."""
    a = _operands(*args, **kwargs)
    mask = token_mask(a.kv_counts, a.kv_indices, a.block_q, a.block_kv, a.q.shape[2], a.k.shape[2])
    if a.kv_mask is not None:
        mask = mask & a.kv_mask[:, None, None, :]
    values = a.v.double()
    scores = (a.q.double() @ a.k.double().transpose(-1, -2) * a.factor).masked_fill(~mask, float("-inf"))
    if a.compensate is not None:
        extra, means = _dropped_means(a, a.compensate)
        scores, values = torch.cat((scores, extra), -1), torch.cat((values, means), 2)
    return _attend(scores, values)


def means_attention_reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(out fp64 [B, H, Sq, D], lse fp64 [B, H, Sq]) of the arguments of `means_attention`."""
    a = _operands(*args, **kwargs)
    assert a.compensate is not None
    return _attend(*_dropped_means(a, a.compensate))
