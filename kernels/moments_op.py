"""`dynamicrad::second_order_attention`: compensation to second order, by the covariances of the dropped blocks.

A mean key and a mean value leave out how keys and values of a block vary. With dk and dv the deviations of its n keys
and values from their means, and E over the block, to second order in scale * q . dk,

    sum exp(scale q . k)   = n exp(scale q . mean k) (1 + u),     u = scale^2 / 2 q' E[dk dk'] q
    sum exp(scale q . k) v = (the same) (mean v + t),             t = scale E[dv dk'] q / (1 + u)

Where attention is diffuse, as it is on noise, t is what a head says about the query at hand, and means alone drown it.
A query block uses one pair of covariances: those of its dropped blocks, weighted by the attention that its mean query
pays to their mean keys. So a query needs two products with D x D matrices instead of two for each dropped block, and

    2 D / Sk + D / (block_q block_kv)        of the products of dense attention (`plans.cost`)

are added: 1.6 % at 32k tokens, head_dim 128 and blocks of 128. At most MOMENT_BYTES of covariances are held at a time;
in training, the backward needs them all. Plain ATen operations around the attention op, so that autograd
differentiates all of it and Inductor fuses what can be fused. Measured in docs/quality.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_op as _registers_attention  # noqa: F401
from . import means_op as _registers_means_attention  # noqa: F401
from . import merge_states as _registers_merge_states  # noqa: F401
from .attention_arguments import Attention, check_means
from .blocks import block_mask, cdiv, valid_counts
from .define import PAIR, parameters_of, signed

MOMENT_BYTES = 512 << 20  # of the covariances of blocks and rows that are held at a time


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, S, D] as [B, H, M, block, D], zeros at the end."""
    count = cdiv(x.shape[2], block)
    return F.pad(x, (0, 0, 0, count * block - x.shape[2])).unflatten(2, (count, block))


def _row_weights(q: Tensor, mean_k: Tensor, counts: Tensor, kept: Tensor, scale: float, block_q: int) -> Tensor:
    """fp32 [B, Hkv, rep, Mq, Mk]: weights of the dropped blocks of a row, of sum 1; 0 in a row that drops none.

    mean_k [B, Hkv, Mk, D], counts int32 [B or 1, Mk], kept bool [P, H', Mq, Mk].
    """
    query, _ = torch.ops.dynamicrad.pool_blocks(q, block_q, None)
    kv_heads = mean_k.shape[1]
    rep = q.shape[1] // kv_heads
    keys = mean_k.float().transpose(-1, -2).unsqueeze(2)
    logits = query.float().unflatten(1, (kv_heads, rep)) @ keys * scale
    logits = logits + counts.float().log().unsqueeze(1).unsqueeze(1).unsqueeze(1)
    own = kept.unflatten(1, (kv_heads, rep)) if kept.shape[1] > 1 else kept.unsqueeze(1)
    logits = torch.where(own, -float("inf"), logits)
    none = (logits == -float("inf")).all(-1, keepdim=True)
    return torch.where(none, 0.0, torch.where(none, 0.0, logits).softmax(-1))


def moments(a: Attention) -> tuple[Tensor, Tensor]:
    """(u fp32 [B, H, Sq], t fp32 [B, H, Sq, D]) of the attention op's arguments; see the formulas above.

    Some heads at a time, so that their covariances take MOMENT_BYTES at most, or those of one key head.
    """
    kept = block_mask(a.kv_counts, a.kv_indices, a.num_kv_blocks)
    kv_heads, rep = a.k.shape[1], a.q.shape[1] // a.k.shape[1]
    dim, blocks = a.k.shape[3], kept.shape[3] + rep * kept.shape[2]
    step = kv_heads
    if isinstance(blocks, int) and isinstance(a.k.shape[0], int):
        step = max(1, MOMENT_BYTES // (2 * dim * dim * blocks * a.k.shape[0] * _dtype(a.q).itemsize))
    parts = []
    for start in range(0, kv_heads, step):
        count = min(step, kv_heads - start)
        own_k, own_v = (x.narrow(1, start, count) for x in (a.k, a.v))
        own = a._replace(q=a.q.narrow(1, start * rep, count * rep), k=own_k, v=own_v)
        parts.append(_moments(own, kept.narrow(1, start * rep, count * rep) if kept.shape[1] > 1 else kept))
    mass, shift = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*parts, strict=True))
    return mass, shift


def _dtype(q: Tensor) -> torch.dtype:
    """Of the covariances; fp16 has too small a range for products of keys, and the CPU no fast bf16."""
    return torch.float32 if q.dtype == torch.float32 or q.device.type == "cpu" else torch.bfloat16


def _moments(a: Attention, kept: Tensor) -> tuple[Tensor, Tensor]:
    """`moments` of some heads at once; kept bool [P, H', Mq, Mk]."""
    q, k, v, scale, block_q, block_kv, kv_mask = a.q, a.k, a.v, a.factor, a.block_q, a.block_kv, a.kv_mask
    (heads, length), (kv_heads, keys, dim) = q.shape[1:3], k.shape[1:]
    counts = valid_counts(keys, block_kv, kv_mask, k.device)  # [B or 1, Mk]
    means = [torch.ops.dynamicrad.pool_blocks(x, block_kv, kv_mask)[0] for x in (k, v)]
    weight = _row_weights(q, means[0], counts, kept, scale, block_q)
    valid = torch.ones(1, keys, dtype=torch.bool, device=k.device) if kv_mask is None else kv_mask
    inside = _blocks(valid.unsqueeze(1).unsqueeze(-1), block_kv)  # [B or 1, 1, Mk, block_kv, 1]
    norm = counts.clamp(min=1).float().rsqrt().unsqueeze(1).unsqueeze(-1).unsqueeze(-1)
    apart = [
        torch.where(inside, (_blocks(x, block_kv).float() - mean.float().unsqueeze(3)) * norm, 0.0).to(_dtype(q))
        for x, mean in zip((k, v), means, strict=True)
    ]
    by_block = apart[0].transpose(-1, -2) @ torch.cat(apart, -1)  # E[dk dk'] beside E[dk dv'], [B, Hkv, Mk, D, 2 D]
    by_row = weight.to(_dtype(q)).flatten(2, 3) @ by_block.flatten(-2)
    by_row = by_row.unflatten(-1, (dim, 2 * dim)).unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
    products = (_blocks(q, block_q).to(_dtype(q)) @ by_row).float().flatten(2, 3).narrow(2, 0, length)
    of_keys, of_both = products.split(dim, -1)
    mass = (0.5 * scale**2 * (of_keys * q.float()).sum(-1)).clamp(min=0.0)
    return mass, scale * of_both / (1.0 + mass.unsqueeze(-1))


def _attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check_means(a)
    kept, kept_lse = torch.ops.dynamicrad.block_sparse_attention(*a._replace(compensate=None))
    dropped, dropped_lse = torch.ops.dynamicrad.means_attention(*a)
    mass, shift = moments(a)
    dropped = (dropped.float() + shift).to(a.q.dtype)
    pair: tuple[Tensor, Tensor] = torch.ops.dynamicrad.merge_states(
        kept, kept_lse, dropped, dropped_lse + torch.log1p(mass)
    )
    return pair


_LIBRARY = torch.library.Library("dynamicrad", "FRAGMENT")
_SCHEMA = torch.library.infer_schema(signed(_attend, parameters_of(Attention), PAIR), mutates_args=())
_LIBRARY.define(f"second_order_attention{_SCHEMA}")
_LIBRARY.impl("second_order_attention", _attend, "CompositeImplicitAutograd")
