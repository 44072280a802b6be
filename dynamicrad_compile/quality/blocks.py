"""Attention under any block mask, slowly and exactly, and masks to compare with: the oracle's and random ones.

For research: everything costs as much as dense attention. What runs in a compiled model is in `kernels`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PlanError
from ..kernels.blocks import cdiv
from ..plans.cost import blocks_to_skip, computed


def block_sums(x: Tensor, block: int, dim: int) -> Tensor:
    """Sums of x over runs of `block` entries of a dimension; the last run may be shorter."""
    length = x.shape[dim]
    padded = F.pad(x.movedim(dim, -1), (0, cdiv(length, block) * block - length))
    return padded.unflatten(-1, (-1, block)).sum(-1).movedim(-1, dim)


def block_counts(length: int, block: int) -> Tensor:
    """int64 [M]: tokens of each block."""
    return torch.arange(length, device="cpu").div(block, rounding_mode="floor").bincount()


def block_mass(q: Tensor, k: Tensor, block: int, scale: float | None = None) -> Tensor:
    """fp32 [B, H, Mq, Mk]: share of its attention that a block of queries pays to a block of keys; rows sum to 1.

    q [B, H, Sq, D], k [B, H, Sk, D].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    share = (q.float() @ k.float().transpose(-1, -2) * scale).softmax(-1)
    by_query = block_sums(block_sums(share, block, -1), block, -2)
    return by_query / block_counts(q.shape[-2], block).to(by_query.device)[:, None]


def block_budget(blocks: int, sparsity: float, block: int, compensate: float) -> int:
    """Blocks of a head [blocks, blocks] that may be read to skip the share `sparsity`, mean keys counted."""
    budget = math.floor((1.0 - blocks_to_skip(sparsity, block, compensate)) * blocks * blocks + 0.5)
    return min(blocks * blocks, max(blocks, budget))


def oracle_mask(mass: Tensor, budget: int) -> Tensor:
    """bool [B, H, Mq, Mk]: the `budget` blocks of each head with the most attention, at least one in each row.

    No choice of as many blocks of a head keeps more attention mass, the best block of each row apart.
    """
    best = F.one_hot(mass.argmax(-1), mass.shape[-1])
    ranked = (mass + 2.0 * best).flatten(-2)
    kept = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked.topk(budget, dim=-1).indices, True)
    return kept.view(mass.shape)


def random_mask(shape: tuple[int, int, int, int], budget: int, seed: int) -> Tensor:
    """bool [B, H, M, M]: the diagonal and, of the rest, as many random blocks as the budget of a head allows.

    Spread evenly over the rows, which differ by at most one block.
    """
    batch, heads, rows, columns = shape
    if rows != columns:
        raise PlanError(f"random blocks need as many query as key blocks, got {rows} and {columns}.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    drawn.diagonal(0, -2, -1).fill_(2.0)
    share = torch.arange(rows + 1, device="cpu") * budget // rows
    rank = drawn.argsort(-1, descending=True).argsort(-1)
    return (rank < share.diff().clamp(min=1)[:, None]).view(batch, heads, rows, columns)


def skipped(mask: Tensor, block: int, compensate: float) -> float:
    """Share of dense attention that a mask [..., Mq, Mk] skips; a row that compensates pays for one key a block."""
    return 1.0 - float(computed(mask.sum(-1), compensate, mask.shape[-1], block))


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    block: int,
    compensate: float = 0.0,
    scale: float | None = None,
    covariance: bool = False,
) -> Tensor:
    """softmax attention [B, H, Sq, D] over the blocks in `mask`, bool [B or 1, H or 1, Mq, Mk]; as the op computes it.

    With `compensate` each dropped block adds its mean key, log(count * compensate) on its logit, and its mean value.
    A row without a block gives zeros if nothing compensates. With `covariance` dropped blocks
    also have what `kernels.moments_op` gives.
    """
    length, keys = q.shape[-2], k.shape[-2]
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    bias = hidden.repeat_interleave(block, -2)[..., :length, :].repeat_interleave(block, -1)[..., :keys]
    if not compensate:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return torch.where(mask.any(-1).repeat_interleave(block, -1)[..., :length, None], out, 0.0)
    counts = block_counts(keys, block).to(q.device)
    means = [block_sums(x, block, -2) / counts[:, None] for x in (k, v)]
    weight = (counts * compensate).log().to(q.dtype)
    extra = torch.where(mask, -math.inf, weight).repeat_interleave(block, -2)[..., :length, :]
    if covariance:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        mass, shift = second_order(q, k, v, mask, block, scale)
        logits = torch.cat([q @ k.mT * scale + bias, q @ means[0].mT * scale + extra + mass.log1p()], dim=-1)
        share = logits.softmax(-1)
        return share @ torch.cat([v, means[1]], dim=-2) + share[..., keys:].sum(-1, keepdim=True) * shift
    bias = torch.cat([bias, extra.expand(*bias.shape[:-1], -1)], dim=-1)
    k, v = torch.cat([k, means[0].to(k.dtype)], dim=-2), torch.cat([v, means[1].to(v.dtype)], dim=-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def second_order(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """What means leave out of dropped blocks: (u [B, H, Sq, 1] of their mass 1 + u; what their values gain, like q).

    With dk, dv the deviations of a block's n keys and values from their means, to second order in scale * q . dk,

        sum exp(scale q . k)   = n exp(scale q . mean k) (1 + u),     u = scale^2 / 2 sum_d q_d^2 E[dk_d^2]
        sum exp(scale q . k) v = (the same) (mean v + scale q E[dk dv'] / (1 + u))

    with the covariance of keys taken for diagonal. Both moments are those of the dropped blocks of a row of blocks,
    weighted by the attention that the row's mean query pays to the blocks' means.
    """
    length, rows = q.shape[-2], mask.shape[-2]
    counts, of = block_counts(k.shape[-2], block).to(q.device), block_counts(length, block).to(q.device)
    means = [block_sums(x, block, -2) / counts[:, None] for x in (k, v)]
    query = block_sums(q, block, -2) / of[:, None]
    logits = query @ means[0].mT * scale + counts.log().to(q.dtype)
    weight = logits.masked_fill(mask, -math.inf).softmax(-1).nan_to_num(0.0)  # of rows that drop nothing: 0

    def by_block(x: Tensor, blocks: int) -> Tensor:
        return F.pad(x, (0, 0, 0, blocks * block - x.shape[-2])).unflatten(-2, (blocks, block))

    apart = [
        by_block(x - mean.repeat_interleave(block, -2)[..., : x.shape[-2], :], len(counts))
        for x, mean in zip((k, v), means, strict=True)
    ]
    own = by_block(q, rows)
    variance = weight @ (apart[0].square().sum(-2) / counts[:, None])
    both = (weight @ (apart[0].mT @ apart[1] / counts[:, None, None]).flatten(-2)).unflatten(-1, (-1, v.shape[-1]))
    mass = 0.5 * scale**2 * (own.square() * variance.unsqueeze(-2)).sum(-1, keepdim=True)
    return tuple(x.flatten(-3, -2)[..., :length, :] for x in (mass, scale * own @ both / (1.0 + mass)))
