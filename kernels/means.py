"""What the kernels read to compensate for dropped blocks: their means, their weights, and which blocks are kept.

A dropped block J adds one key to the softmax: its mean key, with log(count_J * weight) added to the score, and its
mean value; count_J is its number of valid keys. A packed bit per block tells the kept ones, which add nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import pool_op as pooling
from .attention_arguments import Attention, Means
from .blocks import cdiv, in_range


def kept_bits(kv_counts: Tensor, kv_indices: Tensor, m_k: int) -> Tensor:
    """int32 [P, H', Mq, ceil(Mk / 32)] of counts [P, H', Mq] and indices [P, H', Mq, W]: bit J % 32 of word J // 32.

    Bit J is 1 if block J is active in the row; a dense row has all bits set. Plain ATen operations without host
    synchronisation (`x[..., None]` would ask for the device while tracing); an id must not occur twice in a row.
    """
    kv_counts, kv_indices = in_range(kv_counts, kv_indices, m_k)
    words = cdiv(m_k, 32)
    active = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_counts.unsqueeze(-1)
    ids = torch.where(active, kv_indices, 0)
    bit = active.to(torch.int32) << (ids % 32)
    packed = torch.zeros(*kv_counts.shape, words, dtype=torch.int32, device=kv_counts.device)
    packed = packed.scatter_add(-1, (ids // 32).long(), bit)
    return torch.where((kv_counts >= m_k).unsqueeze(-1), -1, packed)


def pooled(a: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """(mean keys, mean values [B, Hkv, Mk, D], counts int32 [B or 1, Mk]) of the op's arguments."""
    mean_k, count = torch.ops.dynamicrad.pool_blocks(a.k, a.block_kv, a.kv_mask)
    mean_v, _ = torch.ops.dynamicrad.pool_blocks(a.v, a.block_kv, a.kv_mask)
    return mean_k, mean_v, count


def spread(grad_means: Tensor, counts: Tensor, a: Attention) -> Tensor:
    """[B, Hkv, Sk, D]: what the gradients of `pooled` means [B, Hkv, Mk, D] are to the keys behind them."""
    return pooling.spread(grad_means, counts, a.block_kv, a.k.shape[2], a.kv_mask)


def means_of(a: Attention) -> Means:
    """`Means` of the op's arguments, computed on their device; `compensate` must be there."""
    mean_k, mean_v, count = pooled(a)
    assert a.compensate is not None
    return Means(mean_k, mean_v, count, a.compensate, kept_bits(a.kv_counts, a.kv_indices, mean_k.shape[2]))
