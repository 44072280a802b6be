"""The gradient of `second_order_attention`, in plain PyTorch operations around the backwards of its two attentions.

Both attentions, the covariances and the merge are computed again. With g the gradient of out, p the share of the
dropped blocks, t and u of `moments_op`, and l' = lse + log(1 + u) of the dropped ones,

    dt = p g        dl' = p (g . (dropped + t - out) + dlse)        du = (dl' - dt . t) / (1 + u)
    dN = dt / (1 + u)        for t = N / (1 + u), N_i = scale q_i A_I
    dA_I = scale sum_i q_i' dN_i        dR_I = scale^2 / 2 sum_i du_i q_i^2
    dC_J = sum_I w_IJ dA_I              dw_IJ = dA_I . C_J + dR_I . var_J

and so on down to q, k and v. Means of deviations have no gradient, as deviations add up to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import pool_op as pooling
from .attention_arguments import Attention, Results
from .blocks import valid_counts
from .means import spread
from .moments import Moments, by_heads, growth_and_shift, in_blocks, moments_of

Gradients = tuple[Tensor, Tensor, Tensor]


def backward(a: Attention, results: Results) -> Gradients:
    """(dq, dk, dv), contiguous, of arguments that are checked; `results.out` and `results.lse` are not read."""
    a = a._replace(qk_int8=False)
    plain, grad, grad_lse = a._replace(compensate=None), results.grad_out.float(), results.grad_lse.unsqueeze(-1)
    kept, kept_lse = torch.ops.dynamicrad.block_sparse_attention(*plain)
    dropped, dropped_lse = torch.ops.dynamicrad.means_attention(*a)
    growth, shift = (
        torch.cat(x, 1) for x in zip(*(growth_and_shift(x, moments_of(x)) for x in by_heads(a)), strict=True)
    )

    corrected, corrected_lse = dropped.float() + shift, dropped_lse.unsqueeze(-1) + growth.log()
    lse = torch.logaddexp(kept_lse.unsqueeze(-1), corrected_lse)
    lse = torch.where(lse == -float("inf"), float("inf"), lse)  # a query without a key has no gradient
    share, own = (corrected_lse - lse).exp(), (kept_lse.unsqueeze(-1) - lse).exp()
    out = own * kept.float() + share * corrected
    grad_kept_lse = own * (_dot(grad, kept.float() - out) + grad_lse)
    grad_corrected_lse = share * (_dot(grad, corrected - out) + grad_lse)
    grad_shift = share * grad
    grad_growth = (grad_corrected_lse - _dot(grad_shift, shift)) / growth

    parts = [
        torch.ops.dynamicrad.block_sparse_attention_backward(
            *_arguments(plain, kept, kept_lse, own * grad, grad_kept_lse)
        ),
        torch.ops.dynamicrad.means_attention_backward(
            *_arguments(a, dropped, dropped_lse, grad_shift, grad_corrected_lse)
        ),
        _moments_backward(a, grad_shift / growth, grad_growth),
    ]
    dq, dk, dv = (
        (x.float() + y.float() + z).to(like.dtype) for x, y, z, like in zip(*parts, (a.q, a.k, a.v), strict=True)
    )
    return dq, dk, dv


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _arguments(a: Attention, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[object, ...]:
    """Of a backward op; the gradients are fp32, that of lse [B, H, Sq, 1]."""
    return (*a[:3], out, lse, grad_out.to(a.q.dtype), grad_lse.squeeze(-1), *a[3:])


def _moments_backward(a: Attention, grad_numerator: Tensor, grad_growth: Tensor) -> Gradients:
    """fp32 gradients of q, k and v from those of N [B, H, Sq, D] and u [B, H, Sq, 1], fp32."""
    parts, start = [], 0
    for some in by_heads(a):
        own = (x.narrow(1, start, some.q.shape[1]) for x in (grad_numerator, grad_growth))
        parts.append(_of_heads(some, moments_of(some), *own))
        start += some.q.shape[1]
    dq, dk, dv = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return dq, dk, dv


def _of_heads(a: Attention, m: Moments, grad_numerator: Tensor, grad_growth: Tensor) -> Gradients:
    """`_moments_backward` of some heads at once."""
    (batch, kv_heads, keys, dim), length, scale = a.k.shape, a.q.shape[2], a.factor
    queries, products = in_blocks(a.q, a.block_q), m.products
    of_sum, of_square = in_blocks(grad_numerator, a.block_q).to(products.dtype), in_blocks(grad_growth, a.block_q)
    dq = scale * (of_sum @ products.transpose(-1, -2)).float()
    dq = dq + scale**2 * of_square * queries.float() * m.squares.unsqueeze(3)
    d_products = scale * (queries.to(products.dtype).transpose(-1, -2) @ of_sum)
    d_squares = (0.5 * scale**2) * (of_square * queries.float().square()).sum(3)

    d_products = d_products.reshape(batch, kv_heads, -1, dim * dim)
    d_squares = d_squares.reshape(batch, kv_heads, -1, dim)
    flat = m.weights.to(products.dtype).transpose(-1, -2)
    d_both = (flat @ d_products).unflatten(-1, (dim, dim))
    d_variance = (m.weights.transpose(-1, -2) @ d_squares).unsqueeze(3)
    d_weights = (d_products @ m.both.flatten(-2).transpose(-1, -2)).float()
    d_weights = d_weights + d_squares @ m.variance.transpose(-1, -2)
    d_logits = scale * m.weights * (d_weights - _dot(m.weights, d_weights))

    counts = valid_counts(keys, a.block_kv, a.kv_mask, a.k.device)
    per_key = counts.clamp(min=1).float().rsqrt().unsqueeze(1).unsqueeze(-1).unsqueeze(-1)
    dk = (m.apart_v @ d_both.transpose(-1, -2)).float() + 2.0 * m.apart_k.float() * d_variance
    dk, dv = ((x * per_key).flatten(2, 3).narrow(2, 0, keys) for x in (dk, (m.apart_k @ d_both).float()))
    if a.kv_mask is not None:
        dk, dv = (torch.where(a.kv_mask.unsqueeze(1).unsqueeze(-1), x, 0.0) for x in (dk, dv))
    dk = dk + spread(d_logits.transpose(-1, -2) @ m.mean_q, counts, a)
    rows = valid_counts(length, a.block_q, None, a.q.device)
    d_mean_q = (d_logits @ m.mean_k).reshape(batch, a.q.shape[1], -1, dim)
    dq = dq.flatten(2, 3).narrow(2, 0, length) + pooling.spread(d_mean_q, rows, a.block_q, length, None)
    return dq, dk, dv
