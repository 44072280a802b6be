"""Attention of sampled query rows under any block mask, at the cost of reading one table.

The exponentials of a row are summed once for each key block: a numerator sum(exp(s) v) and a denominator
sum(exp(s)). The output under a block mask is then a sum over the kept blocks, exactly, and compensation adds one
pooled key for each dropped block. What covariances add is linear in the weights of dropped blocks, too: the products
of a row with each block's moments are a second table. A search that tries many masks on the same q, k and v pays for
attention once, and once more in part for each order of tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..kernels.blocks import cdiv
from ..plans.order import inverse


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


def fewer_channels(v: torch.Tensor, channels: int, seed: int) -> torch.Tensor:
    """Values [H, S, channels] that are sums of all channels of v [H, S, D] with random signs, over sqrt(D).

    Attention is linear in v: what a mask changes in these, squared, is on average what it changes in a channel of v.
    Fewer channels leave room for more rows.
    """
    dim = v.shape[-1]
    if channels >= dim:
        return v
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (dim, channels), generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
    return v @ (signs.to(v.dtype) / math.sqrt(dim))


class Exponentials:
    """Dense attention of the sampled rows of one draw, which all orders of tokens share. float32.

    rows     int64 [R]
    query    [H, R, D], times the scale
    top      [H, R, 1], the largest logit
    weights  [H, R, S], exp(logit - top)
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor) -> None:
        self.rows = rows
        self.query = q[:, rows] / math.sqrt(q.shape[-1])
        self.weights = torch.empty(len(q), len(rows), k.shape[1], dtype=torch.float32, device="cpu")
        for query, keys, logits in zip(self.query, k, self.weights, strict=True):
            torch.mm(query, keys.T, out=logits)
        self.top = self.weights.amax(dim=2, keepdim=True)
        self.weights.sub_(self.top).exp_()


class BlockSums:
    """Sums by key block for the sampled rows of one draw, in one order of tokens. float32. D' channels of values.

    table   [H, R, M, D' + 1]  numerators, and the denominator last, both over exp(row maximum)
    pooled  [H, R, M]          exp(logit) of the block's mean key times its number of keys, over the same
    values  [H, M, D']         mean values
    dense   [H, R, D']         dense attention of the rows
    growth  [H, R, M]          scale^2 / 2 sum_d q_d^2 var_J[d]: a dropped block's mass is multiplied by 1 + it
    shift   [H, R, M, D']      scale q C_J: what its mean value gains, before it is divided by that
    q_mean, k_mean     [H, M, D]  mean queries and keys of all blocks; counts [M] tokens of each block
    q_square, k_var    [H, M, D]  mean squares of the queries of all blocks, variances of their keys, by channel
    scores  [H, M, M]          logarithm of the mass of pairs of blocks, by their means

    var_J and C_J = E[dk dv'] are moments of the deviations of block J's keys and values from their means, as in
    `quality.blocks.second_order`, which has the formulas.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block: int,
        rows: torch.Tensor | Exponentials,
        order: torch.Tensor | None = None,
    ) -> None:
        """q, k [H, S, D], v [H, S, D']; rows int64 [R], or what was made of them; order int64 [S]: the token of each
        place, None in raster order."""
        attention = Exponentials(q, k, rows) if isinstance(rows, torch.Tensor) else rows
        heads, tokens, dim = q.shape
        self.block, self.order, self.scale = block, order, 1.0 / math.sqrt(dim)
        self.row_block = (attention.rows if order is None else inverse(order)[attention.rows]) // block
        blocks = cdiv(tokens, block)
        self.pad = blocks * block - tokens
        self.counts = torch.full((blocks,), block, dtype=torch.int64, device="cpu")
        self.counts[-1] = block - self.pad
        self._allocate((heads, len(attention.rows), blocks), dim, v.shape[-1])
        for head in range(heads):
            values, both = self._set_blocks(head, q[head], k[head], v[head])
            weights = self._by_block(attention.weights[head].T).transpose(1, 2)  # [M, R, block]
            self.table[head] = torch.bmm(weights, values).transpose(0, 1)
            query = attention.query[head]
            self.pooled[head] = (query @ self.k_mean[head].T - attention.top[head]).exp_() * self.counts
            self.growth[head] = 0.5 * query.square() @ self.k_var[head].T
            self.shift[head] = (query @ both).transpose(0, 1)
        self.dense = self._ratio(self.table.sum(dim=2))
        self.variance = float(self.dense.var(correction=0))

    def _allocate(self, shape: tuple[int, int, int], dim: int, channels: int) -> None:
        heads, _, blocks = shape
        self.table = torch.empty(*shape, channels + 1, dtype=torch.float32, device="cpu")
        self.shift = torch.empty(*shape, channels, dtype=torch.float32, device="cpu")
        self.pooled, self.growth = torch.empty(2, *shape, dtype=torch.float32, device="cpu")
        moments = torch.empty(4, heads, blocks, dim, dtype=torch.float32, device="cpu")
        self.q_mean, self.k_mean, self.q_square, self.k_var = moments
        self.values = torch.empty(heads, blocks, channels, dtype=torch.float32, device="cpu")
        self.scores = torch.empty(heads, blocks, blocks, dtype=torch.float32, device="cpu")

    def _by_block(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, n] as [M, block, n], in this order, with zeros at the end."""
        if self.order is not None:
            x = x.index_select(0, self.order)
        return F.pad(x, (0, 0, 0, self.pad)).view(-1, self.block, x.shape[-1])

    def _set_blocks(
        self, head: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the moments of all blocks of a head; returns values beside ones, [M, block, D' + 1], and C_J."""
        queries, keys, values = (self._by_block(x) for x in (q, k, v))
        counts = self.counts[:, None]
        self.q_mean[head], self.k_mean[head], self.values[head] = (x.sum(1) / counts for x in (queries, keys, values))
        self.q_square[head] = queries.square().sum(1) / counts
        inside = (torch.arange(self.block, device="cpu") < counts)[..., None]
        apart = (keys - self.k_mean[head, :, None]) * inside
        self.k_var[head] = apart.square().sum(1) / counts
        # The keys' deviations sum to 0, so the mean of the values adds nothing.
        both = apart.mT @ (values - self.values[head, :, None]) / counts[..., None]
        self.scores[head] = self.q_mean[head] @ self.k_mean[head].T * self.scale + self.counts.log()
        return torch.cat([values, inside.to(values.dtype)], dim=2), both

    def equalise(self) -> None:
        """Scale each head's values so that its dense output has a mean square of 1: all heads count alike."""
        size = self.dense.square().mean(dim=(1, 2)).sqrt().clamp(min=1e-12)[:, None, None]
        self.table[..., :-1] /= size[..., None]
        self.shift /= size[..., None]
        self.values /= size
        self.dense /= size
        self.variance = float(self.dense.var(correction=0))

    @staticmethod
    def _ratio(sums: torch.Tensor) -> torch.Tensor:
        return sums[..., :-1] / sums[..., -1:]

    def errors(self) -> torch.Tensor:
        """float64 [H, M, M]: logarithm of what would be wrong if a block's mean stood for it (`kernels.select_op`).

        -inf for blocks whose keys are all alike.
        """
        error = self.q_square.double() @ self.k_var.double().mT * (self.scale**2 / 2)
        return self.scores.double() + error.log()

    def output(self, mask: torch.Tensor, compensate: float, covariance: bool = False) -> torch.Tensor:
        """Attention [H, R, D'] of the rows with the blocks in `mask`, bool [H or 1, Mq, Mk]; every row keeps one.

        What stands for dropped blocks: nothing (compensate = 0), their means with a weight, with covariances.
        """
        kept = mask[:, self.row_block].expand(self.pooled.shape).to(torch.float32)
        sums = torch.matmul(kept.unsqueeze(2), self.table).squeeze(2)
        if compensate:
            weights = self.pooled * (1.0 - kept) * compensate
            mass = weights.sum(dim=-1, keepdim=True)
            values = weights @ self.values
            if covariance:
                growth, shift = self._second_order(mask)
                values = values * growth + mass * shift
                mass = mass * growth
            sums[..., :-1] += values
            sums[..., -1:] += mass
        return self._ratio(sums)

    def _second_order(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """1 + u [H, R, 1] and (1 + u) t [H, R, D'] of the rows: moments of their dropped blocks, weighted by mass."""
        kept = mask[:, self.row_block]
        logits = self.scores[:, self.row_block].masked_fill(kept, -math.inf)
        share = logits.softmax(dim=-1).nan_to_num(0.0)  # of rows that drop nothing: 0
        growth = 1.0 + (share * self.growth).sum(dim=-1, keepdim=True)
        return growth, torch.matmul(share.unsqueeze(2), self.shift).squeeze(2)

    def error(self, mask: torch.Tensor, compensate: float, covariance: bool = False) -> float:
        """Mean squared difference to dense attention over the variance of dense attention."""
        difference = self.output(mask, compensate, covariance).sub_(self.dense)
        return float(difference.square().mean()) / (self.variance + 1e-6)
