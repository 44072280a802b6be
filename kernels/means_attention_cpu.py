"""CPU path of `means_attention`: dense products of some queries of a head with all means, those kept hidden by -inf.

    S = scale * Q M_k^T + log(n) + log(c)      O = softmax(S) M_v

There are tokens / block_kv means, so nothing is gathered, and products and softmax are those of PyTorch.
Scores are fp32 whatever the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_arguments import Attention, Results
from .blocks import block_mask, cdiv
from .means import pooled, spread

SCORE_BYTES = 8 << 20  # scores held at a time


class _Part(NamedTuple):
    """Some queries of one head of one sample."""

    at: tuple[int, int, slice]  # sample, head, queries
    kv_head: int
    q: Tensor  # fp32 [n, D]
    scores: Tensor  # fp32 [n, Mk], -inf where the row keeps the block
    keys: Tensor  # fp32 [Mk, D]
    values: Tensor  # fp32 [Mk, D]


def _parts(a: Attention, mean_k: Tensor, mean_v: Tensor, counts: Tensor) -> Iterator[_Part]:
    """All queries, SCORE_BYTES of scores at a time; means [B, Hkv, Mk, D], counts int32 [B or 1, Mk]."""
    batch, heads, q_len, _ = a.q.shape
    assert a.compensate is not None
    kept = block_mask(a.kv_counts, a.kv_indices, a.num_kv_blocks)
    bias = (counts.float().log() + a.compensate.log()[:, None]).expand(batch, -1)
    size = max(1, SCORE_BYTES // (4 * a.block_q * max(1, a.num_kv_blocks)))  # rows of the plan
    for b in range(batch):
        plans = kept[b if kept.shape[0] > 1 else 0]
        for h in range(heads):
            kv_head = h // (heads // a.k.shape[1])
            keys, values = mean_k[b, kv_head].float(), mean_v[b, kv_head].float()
            rows = torch.where(plans[h if plans.shape[0] > 1 else 0], -float("inf"), bias[b])  # [Mq, Mk]
            for start in range(0, cdiv(q_len, a.block_q), size):
                own = slice(start * a.block_q, min((start + size) * a.block_q, q_len))
                q = a.q[b, h, own].float()
                hidden = rows[start : start + size].repeat_interleave(a.block_q, 0)[: q.shape[0]]
                scores = torch.addmm(hidden, q, keys.t(), alpha=a.factor)
                yield _Part((b, h, own), kv_head, q, scores, keys, values)


def forward(a: Attention) -> tuple[Tensor, Tensor]:
    """(out, lse) of CPU tensors, contiguous; arguments already checked."""
    out = torch.empty(a.q.shape, dtype=a.q.dtype, device="cpu")
    lse = torch.empty(a.q.shape[:3], dtype=torch.float32, device="cpu")
    # The caller's autocast must not narrow the products in here.
    with torch.autocast("cpu", enabled=False):
        for part in _parts(a, *pooled(a)):
            top = part.scores.amax(-1, keepdim=True)
            none = top == -float("inf")  # no mean: out 0, lse -inf
            p = part.scores.sub_(torch.where(none, 0.0, top)).exp_()
            total = p.sum(-1, keepdim=True)
            out[part.at] = (p @ part.values).div_(torch.where(none, 1.0, total))
            lse[part.at] = (top + total.log())[:, 0]
    return out, lse


def backward(a: Attention, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of CPU tensors, contiguous; arguments already checked. Keys share the gradient of their mean."""
    means = pooled(a)
    dq = torch.empty(a.q.shape, dtype=a.q.dtype, device="cpu")
    dmean_k, dmean_v = (torch.zeros(x.shape, dtype=torch.float32, device="cpu") for x in means[:2])
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for part in _parts(a, *means):
            (b, _, _), g = part.at, part.kv_head
            out, grad_out = results.out[part.at].float(), results.grad_out[part.at].float()
            lse = results.lse[part.at]
            lse = torch.where(torch.isneginf(lse), float("inf"), lse)
            p = part.scores.sub_(lse[:, None]).exp_()
            delta = (out * grad_out).sum(-1) - results.grad_lse[part.at]
            ds = torch.addmm(delta[:, None].neg(), grad_out, part.values.t()).mul_(p)
            dq[part.at] = (ds @ part.keys).mul_(a.factor)
            dmean_v[b, g].addmm_(p.t(), grad_out)
            dmean_k[b, g].addmm_(ds.t(), part.q, alpha=a.factor)
        dk, dv = (spread(grad, means[2], a).to(a.k.dtype).contiguous() for grad in (dmean_k, dmean_v))
    return dq, dk, dv
