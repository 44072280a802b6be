"""Queries and keys in int8, for scores from int8 products: twice the rate of fp16 on tensor cores.

    q = a_q q8,   k - m = a_k k8        a = max |.| / 127 of each row, m the mean key of a head

Subtracting m from all keys of a head changes no softmax, and the keys of video models have large means (SageAttention,
Zhang et al. 2025, section 4.2). It lowers each lse by scale q . m, which `shift` gives back. Mean keys of blocks lose m
as well, so compensation is not touched. Rows are quantised one by one, so an outlier costs only its own token.

CUDA quantises in a Triton kernel; CPU rounds the same way and goes on in fp32, which shows the error and gains nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 127.0


class Quantised(NamedTuple):
    """Rows of x [B, H, S, D]."""

    values: Tensor  # int8 [B, H, S, D] contiguous
    scales: Tensor  # fp32 [B, H, S] contiguous


def mean_key(k: Tensor) -> Tensor:
    """fp32 [B, Hkv, D], the mean of all keys [B, Hkv, Sk, D]."""
    return k.mean(2, dtype=torch.float32)


def quantise(x: Tensor, mean: Tensor | None = None) -> Quantised:
    """Rows of x [B, H, S, D], less `mean` fp32 [B, H, D], in int8. Plain PyTorch."""
    rows = x.float() if mean is None else x.float() - mean.unsqueeze(2)
    scales = rows.abs().amax(-1).clamp(min=1e-20) / LIMIT
    return Quantised((rows / scales.unsqueeze(-1)).round().to(torch.int8), scales)


def dequantise(x: Quantised) -> Tensor:
    """fp32 [B, H, S, D]."""
    return x.values.float() * x.scales.unsqueeze(-1)


def rounded(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k as int8 gives them back, in their dtypes, without the mean key; what the lse of those lacks)."""
    mean = mean_key(k)
    return dequantise(quantise(q)).to(q.dtype), dequantise(quantise(k, mean)).to(k.dtype), shift(q, mean, scale)


def shift(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """fp32 [B, H, Sq]: scale q . m, what the lse of keys less their mean m [B, Hkv, D] lacks."""
    heads, kv_heads = q.shape[1], mean.shape[1]
    mean = mean.repeat_interleave(heads // kv_heads, 1)
    return torch.matmul(q, mean.to(q.dtype).unsqueeze(-1)).squeeze(-1).float() * scale
