"""Covariances of dropped blocks in plain PyTorch operations, some heads at a time: for gradients, and to read.

`Moments` holds what `moments_op` defines, for the queries, keys and values of some heads. Nothing synchronises with the
host, and none of x[..., None], x[..., :n] and x.contiguous() asks for a device while CUDA is traced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_arguments import Attention
from .blocks import block_mask, cdiv, valid_counts

MOMENT_BYTES = 512 << 20  # of the covariances of blocks and rows that are held at a time


class Moments(NamedTuple):
    """Of some heads. Means and weights are fp32; what has two dimensions of D, and deviations, have `dtype_of`."""

    mean_q: Tensor  # [B, Hkv, rep Mq, D]
    mean_k: Tensor  # [B, Hkv, Mk, D]
    apart_k: Tensor  # [B, Hkv, Mk, block_kv, D], deviations from the mean over sqrt(n); 0 for what does not count
    apart_v: Tensor
    weights: Tensor  # [B, Hkv, rep Mq, Mk], w; rows that drop nothing are 0
    both: Tensor  # [B, Hkv, Mk, D, D], C
    variance: Tensor  # [B, Hkv, Mk, D]
    products: Tensor  # [B, H, Mq, D, D], A
    squares: Tensor  # [B, H, Mq, D], R


def dtype_of(x: Tensor) -> torch.dtype:
    """Of covariances; fp16 has too small a range for products of keys, and the CPU no fast bf16."""
    return torch.float32 if x.dtype == torch.float32 or x.device.type == "cpu" else torch.bfloat16


def in_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, S, D] as [B, H, M, block, D], zeros at the end."""
    count = cdiv(x.shape[2], block)
    return F.pad(x, (0, 0, 0, count * block - x.shape[2])).unflatten(2, (count, block))


def by_heads(a: Attention) -> Iterator[Attention]:
    """The arguments of some heads after the other, whose covariances take MOMENT_BYTES, or those of one key head."""
    kv_heads, rep, dim = a.k.shape[1], a.q.shape[1] // a.k.shape[1], a.k.shape[3]
    step, blocks = kv_heads, a.num_kv_blocks + rep * a.kv_counts.shape[2]
    if isinstance(blocks, int) and isinstance(a.k.shape[0], int):
        step = max(1, MOMENT_BYTES // (dim * dim * blocks * a.k.shape[0] * dtype_of(a.q).itemsize))
    for start in range(0, kv_heads, step):
        count = min(step, kv_heads - start)
        shared = a.kv_counts.shape[1] == 1
        counts, indices = (x if shared else x.narrow(1, start * rep, count * rep) for x in (a.kv_counts, a.kv_indices))
        yield a._replace(
            q=a.q.narrow(1, start * rep, count * rep),
            k=a.k.narrow(1, start, count),
            v=a.v.narrow(1, start, count),
            kv_counts=counts,
            kv_indices=indices,
        )


def moments_of(a: Attention, kept: Tensor | None = None) -> Moments:
    """Of all heads in `a`, at once; kept bool [P, H', Mq, Mk] of its plan, for where `block_mask` can't be had."""
    (batch, kv_heads, keys, dim), heads, rows = a.k.shape, a.q.shape[1], a.kv_counts.shape[2]
    counts = valid_counts(keys, a.block_kv, a.kv_mask, a.k.device)  # [B or 1, Mk]
    n = counts.clamp(min=1).float().unsqueeze(1).unsqueeze(-1)
    valid = torch.ones(1, keys, dtype=torch.bool, device=a.k.device) if a.kv_mask is None else a.kv_mask
    inside = in_blocks(valid.unsqueeze(1).unsqueeze(-1), a.block_kv)  # [B or 1, 1, Mk, block_kv, 1]
    means, apart = [], []
    for x in (a.k, a.v):
        tokens = torch.where(inside, in_blocks(x, a.block_kv).float(), 0.0)
        means.append(tokens.sum(3) / n)
        deviations = (tokens - means[-1].unsqueeze(3)) * n.rsqrt().unsqueeze(-1)
        apart.append(torch.where(inside, deviations, 0.0))
    of_row = valid_counts(a.q.shape[2], a.block_q, None, a.q.device).float().unsqueeze(1).unsqueeze(-1)
    mean_q = (in_blocks(a.q, a.block_q).float().sum(3) / of_row).reshape(batch, kv_heads, -1, dim)
    if kept is None:
        kept = block_mask(a.kv_counts, a.kv_indices, a.num_kv_blocks)
    kept = kept.expand(batch, heads, -1, -1)
    weights = row_weights(mean_q, means[0], counts, kept.reshape(batch, kv_heads, -1, kept.shape[3]), a.factor)
    variance = apart[0].square().sum(3)
    narrow_k, narrow_v = (x.to(dtype_of(a.q)) for x in apart)
    both = narrow_k.transpose(-1, -2) @ narrow_v
    products = (weights.to(both.dtype) @ both.flatten(-2)).reshape(batch, heads, rows, dim, dim)
    squares = (weights @ variance).reshape(batch, heads, rows, dim)
    return Moments(mean_q, means[0], narrow_k, narrow_v, weights, both, variance, products, squares)


def row_weights(mean_q: Tensor, mean_k: Tensor, counts: Tensor, kept: Tensor, scale: float) -> Tensor:
    """fp32 [B, Hkv, rep Mq, Mk], softmax over dropped blocks; counts int32 [B or 1, Mk], kept bool like the result."""
    number = counts.float().unsqueeze(1).unsqueeze(1)
    dropped = torch.logical_and(torch.logical_not(kept), number > 0)
    logits = mean_q @ mean_k.transpose(-1, -2) * scale + number.clamp(min=1).log()
    logits = torch.where(dropped, logits, -float("inf"))
    none = dropped.float().sum(-1, keepdim=True) == 0
    return torch.where(none, 0.0, torch.where(none, 0.0, logits).softmax(-1))


def growth_and_shift(a: Attention, m: Moments) -> tuple[Tensor, Tensor]:
    """(1 + u fp32 [B, H, Sq, 1], t fp32 [B, H, Sq, D]) of the heads of `a`."""
    queries = in_blocks(a.q, a.block_q)
    growth = (queries.float().square() @ m.squares.unsqueeze(-1)) * (0.5 * a.factor**2) + 1.0
    shift = a.factor * (queries.to(m.products.dtype) @ m.products).float() / growth
    length = a.q.shape[2]
    return growth.flatten(2, 3).narrow(2, 0, length), shift.flatten(2, 3).narrow(2, 0, length)
