"""Slow fp64 reference of `second_order_attention`: loops over blocks of queries and, for each, over dropped blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .attention_arguments import Attention
from .attention_reference import kept_blocks


def second_order_attention_reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(out fp64 [B, H, Sq, D], lse fp64 [B, H, Sq]) of the op's arguments; differentiable in q, k and v."""
    a = Attention(*args, **kwargs)
    assert a.compensate is not None
    weight = a.compensate.double().expand(a.q.shape[0])
    a = a._replace(q=a.q.double(), k=a.k.double(), v=a.v.double())
    (batch, heads, length, dim), keys = a.q.shape, a.k.shape[2]
    starts = range(0, keys, a.block_kv)
    kept = kept_blocks(a.kv_counts, a.kv_indices, len(starts)).expand(batch, heads, -1, -1)
    mask = torch.ones(1, keys, dtype=torch.bool, device="cpu") if a.kv_mask is None else a.kv_mask
    usable = mask.expand(batch, -1)
    rows = []
    for b in range(batch):
        for h in range(heads):
            own = h // (heads // a.k.shape[1])
            blocks = [
                tuple(x[b, own, start : start + a.block_kv][usable[b, start : start + a.block_kv]] for x in (a.k, a.v))
                for start in starts
            ]
            for row in range(kept.shape[2]):
                queries = a.q[b, h, row * a.block_q : (row + 1) * a.block_q]
                pairs = [pair for pair in zip(blocks, kept[b, h, row].tolist(), strict=True) if len(pair[0][0])]
                here, gone = ([block for block, keep in pairs if keep == wanted] for wanted in (True, False))
                rows.append(_row(queries, here, gone if weight[b] > 0 else [], weight[b], a.factor))
    out, lse = (torch.cat(x) for x in zip(*rows, strict=True))
    return out.view(batch, heads, length, dim), lse.view(batch, heads, length)


def _row(queries: Tensor, here: list[Any], gone: list[Any], weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [n, D], lse [n]) of queries [n, D] that read the blocks `here` and drop `gone`: (keys, values) of each."""
    scores = [scale * queries @ k.T for k, _ in here]
    values = [v.expand(len(queries), -1, -1) for _, v in here]
    if gone:
        means = [(k.mean(0), v.mean(0)) for k, v in gone]
        logits = [scale * queries.mean(0) @ m + math.log(len(k)) for (m, _), (k, _) in zip(means, gone, strict=True)]
        share = torch.stack(logits).softmax(0)
        apart = [(k - m, v - n) for (k, v), (m, n) in zip(gone, means, strict=True)]
        variance = sum(s * dk.square().mean(0) for s, (dk, _) in zip(share, apart, strict=True))
        both = sum(s * dk.T @ dv / len(dk) for s, (dk, dv) in zip(share, apart, strict=True))
        u = scale**2 / 2 * (queries.square() * variance).sum(-1, keepdim=True)
        shift = scale * queries @ both / (1 + u)
        for (k, _), (m, n) in zip(gone, means, strict=True):
            scores.append((scale * queries @ m)[:, None] + (len(k) * weight * (1 + u)).log())
            values.append((n + shift)[:, None])
    if not scores:
        return torch.zeros_like(queries), torch.full_like(queries[:, 0], -float("inf"))
    joined, read = torch.cat(scores, 1), torch.cat(values, 1)
    return (joined.softmax(-1)[:, None] @ read)[:, 0], joined.logsumexp(-1)
