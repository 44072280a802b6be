"""What the kernels read to compensate for dropped blocks: their means, their weights, and which blocks are kept.

A dropped block J adds one key to the softmax: its mean key, with log(count_J * weight) added to the score, and its
mean value; count_J is its number of valid keys. A packed bit per block tells the kept ones, which add nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import pool_op as pooling  # noqa: F401  registers dynamicrad::pool_blocks
from .blocks import cdiv


@dataclass(frozen=True)
class Means:
    """Mean keys and values of all blocks, and which rows already read them in full."""

    keys: Tensor  # [B, Hkv, Mk, D] contiguous, dtype of k
    values: Tensor  # [B, Hkv, Mk, D] contiguous, dtype of v
    counts: Tensor  # int32 [B or 1, Mk], valid keys
    weight: Tensor  # fp32 [B or 1], the op's `compensate`; nothing is added where it is not positive
    bits: Tensor  # int32 [P, H', Mq, ceil(Mk / 32)], of `kept_bits`


def kept_bits(kv_counts: Tensor, kv_indices: Tensor, m_k: int) -> Tensor:
    """int32 [P, H', Mq, ceil(Mk / 32)] of counts [P, H', Mq] and indices [P, H', Mq, W]: bit J % 32 of word J // 32.

    Bit J is 1 if block J is active in the row; a dense row has all bits set. Plain ATen operations without host
    synchronisation (`x[..., None]` would ask for the device while tracing); an id must not occur twice in a row.
    """
    words = cdiv(m_k, 32)
    active = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_counts.unsqueeze(-1)
    ids = torch.where(active, kv_indices, 0)
    bit = active.to(torch.int32) << (ids % 32)
    packed = torch.zeros(*kv_counts.shape, words, dtype=torch.int32, device=kv_counts.device)
    packed = packed.scatter_add(-1, (ids // 32).long(), bit)
    return torch.where((kv_counts >= m_k).unsqueeze(-1), -1, packed)


def means_of(
    k: Tensor,
    v: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    block_kv: int,
    kv_mask: Tensor | None,
    compensate: Tensor,
) -> Means:
    """`Means` of the attention op's arguments, computed on their device."""
    mean_k, count = torch.ops.dynamicrad.pool_blocks(k, block_kv, kv_mask)
    mean_v, _ = torch.ops.dynamicrad.pool_blocks(v, block_kv, kv_mask)
    bits = kept_bits(kv_counts, kv_indices, mean_k.shape[2])
    return Means(mean_k, mean_v, count, compensate, bits)
