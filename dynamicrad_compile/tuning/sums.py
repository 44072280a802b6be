"""Attention of sampled query rows under any block mask, at the cost of reading one table.

The exponentials of a row are summed once for each key block: a numerator sum(exp(s) v) and a denominator
sum(exp(s)). The output under a block mask is then a sum over the kept blocks, exactly, and compensation adds one
pooled key for each dropped block. A search that tries many masks on the same q, k and v pays for attention once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..kernels.blocks import cdiv


def sample_rows(tokens: int, rows: int | None, seed: int) -> torch.Tensor:
    """int64 [R]: query rows, one drawn uniformly from each of R equal parts of the sequence (all if rows is None).

    The mean over these rows is an unbiased estimate of the mean over all rows.
    """
    if rows is None or rows >= tokens:
        return torch.arange(tokens, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    parts = torch.arange(rows, dtype=torch.float64, device="cpu")
    drawn = (parts + torch.rand(rows, generator=generator, dtype=torch.float64, device="cpu")) * (tokens / rows)
    return drawn.long().clamp_(max=tokens - 1)


class BlockSums:
    """Sums by key block for the sampled rows of one draw. float32.

    table   [H, R, M, D + 1]  numerators, and the denominator last, both over exp(row maximum)
    pooled  [H, R, M]         exp(logit) of the block's mean key times its number of keys, over the same
    values  [H, M, D]         mean values
    dense   [H, R, D]         dense attention of the rows
    q_mean, k_mean [H, M, D]  mean queries and keys of all blocks; counts [M] tokens of each block
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, rows: torch.Tensor) -> None:
        heads, tokens, dim = q.shape
        blocks = cdiv(tokens, block)
        pad = blocks * block - tokens
        scale = 1.0 / math.sqrt(dim)
        self.row_block = rows // block
        self.counts = torch.full((blocks,), block, dtype=torch.int64, device="cpu")
        self.counts[-1] = block - pad
        self.q_mean, self.k_mean, self.values = (self._mean(x, block, pad) for x in (q, k, v))
        self.table = torch.empty(heads, len(rows), blocks, dim + 1, dtype=torch.float32, device="cpu")
        self.pooled = torch.empty(heads, len(rows), blocks, dtype=torch.float32, device="cpu")
        for head in range(heads):
            keys = F.pad(k[head], (0, 0, 0, pad))
            ones = F.pad(torch.ones(tokens, 1, dtype=torch.float32, device="cpu"), (0, 0, 0, pad))
            values = torch.cat([F.pad(v[head], (0, 0, 0, pad)), ones], dim=1).view(blocks, block, dim + 1)
            for low in range(0, len(rows), 512):
                part = slice(low, low + 512)
                query = q[head, rows[part]] * scale
                logits = query @ keys.T
                logits[:, tokens:] = -math.inf
                top = logits.amax(dim=1, keepdim=True)
                weights = logits.sub_(top).exp_().view(-1, blocks, block).transpose(0, 1)
                self.table[head, part] = torch.bmm(weights, values).transpose(0, 1)
                self.pooled[head, part] = (query @ self.k_mean[head].T - top).exp_() * self.counts
        self.dense = self._ratio(self.table.sum(dim=2))
        self.variance = float(self.dense.var(correction=0))

    def equalise(self) -> None:
        """Scale each head's values so that its dense output has a mean square of 1: all heads count alike."""
        size = self.dense.square().mean(dim=(1, 2)).sqrt().clamp(min=1e-12)[:, None, None]
        self.table[..., :-1] /= size[..., None]
        self.values /= size
        self.dense /= size
        self.variance = float(self.dense.var(correction=0))

    @staticmethod
    def _mean(x: torch.Tensor, block: int, pad: int) -> torch.Tensor:
        total = F.pad(x, (0, 0, 0, pad)).view(len(x), -1, block, x.shape[-1]).sum(dim=2)
        total[:, :-1] /= block
        total[:, -1] /= block - pad
        return total

    @staticmethod
    def _ratio(sums: torch.Tensor) -> torch.Tensor:
        return sums[..., :-1] / sums[..., -1:]

    def output(self, mask: torch.Tensor, compensate: float) -> torch.Tensor:
        """Attention [H, R, D] of the rows with the blocks in `mask`, bool [H or 1, Mq, Mk]; every row keeps one."""
        kept = mask[:, self.row_block].expand(self.pooled.shape).to(torch.float32)
        sums = torch.matmul(kept.unsqueeze(2), self.table).squeeze(2)
        if compensate:
            weights = self.pooled * (1.0 - kept) * compensate
            sums[..., :-1] += weights @ self.values
            sums[..., -1] += weights.sum(dim=-1)
        return self._ratio(sums)

    def error(self, mask: torch.Tensor, compensate: float) -> float:
        """Mean squared difference to dense attention over the variance of dense attention."""
        difference = self.output(mask, compensate).sub_(self.dense)
        return float(difference.square().mean()) / (self.variance + 1e-6)
