"""Compensation on the CPU: mean keys and values of the dropped blocks, added to the sums over the kept ones.

A query block reads the means of *all* blocks in place, as one more set of keys, with the bias

    log(valid keys) + log(compensate), or -inf where the row keeps the block

Two GEMMs over tokens / block_kv keys, without a gather.
"""

from __future__ import annotations

import math

import torch

from .softmax_cpu import BIAS_LIMIT, LOG2_E
from .workers import Buffers, Task

ALIGN = 16  # the number of means is padded to a multiple of this, for softmax and GEMM


class BlockMeans:
    """Mean keys and values of the blocks of some heads of one sample, rounded to the inputs' dtype."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
        heads: int,
        kv_len: int,
        compensate: float,
        dtype: torch.dtype,
        buffers: Buffers,
    ) -> None:
        """Of fp32 keys and values [heads * Mk, block, D], zeros past kv_len; valid bool [Mk, block], None for all.

        `compensate` must be positive. `fill` computes the means `keys` and `values` [heads, Mk padded, D], and `exact`
        [heads, Mk, D], the mean keys before they are rounded.
        """
        n_blocks, self.block, dim = keys.shape
        self.heads, self.n_kv, self.dtype = heads, n_blocks // heads, dtype
        padded = -(-self.n_kv // ALIGN) * ALIGN
        self.sources, self.valid = (keys, values), valid
        self.keys, self.values = (buffers.get(name, heads, padded, dim) for name in ("mean_keys", "mean_values"))
        self.exact = self.keys[:, : self.n_kv]
        if dtype != torch.float32:
            self.exact = buffers.get("exact_mean_keys", heads, self.n_kv, dim)
        if valid is None:
            counts = torch.full((self.n_kv,), self.block, dtype=torch.int64, device="cpu")
            counts[-1] = kv_len - (self.n_kv - 1) * self.block
        else:
            counts = valid.sum(-1)
        self.counts = counts.clamp(min=1)[:, None]
        bias = counts.float().log_().add_(math.log(compensate)).mul_(LOG2_E)
        limits = math.log2(compensate), math.log2(compensate) + math.log2(self.block)
        self.plain = max(map(abs, limits)) <= BIAS_LIMIT  # the bias allows a softmax without a shift
        # One column more, for ids that do not count.
        self.bias = torch.nn.functional.pad(bias, (0, padded + 1 - self.n_kv), value=float("-inf"))

    def fill(self) -> list[Task]:
        """Tasks that compute the means."""

        def fill(source: torch.Tensor, mean: torch.Tensor, h: int) -> Task:
            def task(_: Buffers) -> None:
                tokens = source[h * self.n_kv : (h + 1) * self.n_kv]
                if self.valid is not None:
                    tokens = tokens.masked_fill(~self.valid[..., None], 0.0)
                exact = tokens.sum(1) / self.counts
                if mean is self.keys:
                    self.exact[h] = exact
                mean[h, : self.n_kv] = exact.to(self.dtype)
                mean[h, self.n_kv :] = 0

            return task

        pairs = zip(self.sources, (self.keys, self.values), strict=True)
        return [fill(source, mean, h) for source, mean in pairs for h in range(self.heads)]

    def row_bias(self, counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | None:
        """Base-2 bias [rows, Mk padded] of rows counts [rows] and indices [rows, W]: -inf where a block is kept.

        None if the rows drop nothing.
        """
        active = torch.arange(indices.shape[-1], device="cpu") < counts[:, None]
        bias = self.bias.repeat(counts.numel(), 1)
        bias.scatter_(1, torch.where(active, indices, bias.shape[1] - 1).long(), float("-inf"))
        bias = bias[:, :-1].masked_fill_((counts >= self.n_kv)[:, None], float("-inf"))
        return bias if bool((bias > float("-inf")).any()) else None
