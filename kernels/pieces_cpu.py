"""Pieces of query blocks that read a kv block, and the five products of each: the work of `attention_backward_cpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .workers import Buffers, Task

SCORE_BYTES = 512 << 10  # scores of one piece; there are two such matrices


class Means(NamedTuple):
    """Mean keys and values of the blocks of one sample, some of its heads."""

    k: Tensor  # fp32 [hkv, Mk, D]
    v: Tensor
    bias: Tensor  # fp32 [Mk], log(n * compensate), added to the scores of a mean of n keys
    per_key: Tensor  # fp32 [Mk], 1 / n


class Plan(NamedTuple):
    """Which blocks the rows of some heads of one sample read, and the same by key block."""

    kept: Tensor  # bool [h or 1, Mq, Mk]; the mean of such a block is not read
    q_counts: Tensor  # int32 [h or 1, Mk], number of query blocks that read a kv block
    q_indices: Tensor  # int32 [h or 1, Mk, Mq], which ones


@dataclass
class Work:
    """Some heads of one sample. Query-side tensors are contiguous fp32 and padded to whole blocks."""

    q: Tensor  # [h, Mq, block_q * D]
    grad_out: Tensor  # [h, Mq, block_q * D]
    minus_lse: Tensor  # [h, Mq, block_q], -inf for queries without a key and for padding: their P is 0
    minus_delta: Tensor  # [h, Mq, block_q]
    dq: Tensor  # [parts, h, Mq, block_q * D], without the factor `scale`
    k: Tensor  # fp32 [hkv, Sk, D], any strides between rows
    v: Tensor  # fp32 [hkv, Sk, D]
    dk: Tensor  # [hkv, Sk, D], dtype of the result
    dv: Tensor  # [hkv, Sk, D]
    usable: Tensor | None  # bool [Sk]; None: all keys
    plan: Plan
    means: Means | None  # with compensation
    block_q: int
    block_kv: int
    scale: float


@dataclass
class _Piece:
    """Some query blocks of a head, stacked."""

    q: Tensor  # [n, D]
    grad_out: Tensor  # [n, D]
    minus_lse: Tensor  # [n, 1]
    minus_delta: Tensor  # [n, 1]
    ids: Tensor | None  # int64 [blocks] if gathered, else None
    first: int  # the first query block of a run


def _piece(work: Work, head: int, ids: list[int], buffers: Buffers) -> _Piece:
    blocks, width = len(ids), work.q.shape[-1]
    sources = (work.q[head], work.grad_out[head], work.minus_lse[head], work.minus_delta[head])
    if ids[-1] - ids[0] == blocks - 1:
        picked, index = [x[ids[0] : ids[-1] + 1] for x in sources], None
    else:
        index = torch.tensor(ids, dtype=torch.int64, device="cpu")
        shapes = ((blocks, width),) * 2 + ((blocks, work.block_q),) * 2
        picked = [
            torch.index_select(x, 0, index, out=buffers.get(f"piece{i}", *shape))
            for i, (x, shape) in enumerate(zip(sources, shapes, strict=True))
        ]
    rows = blocks * work.block_q
    q, grad_out, minus_lse, minus_delta = (x.view(rows, -1) for x in picked)
    return _Piece(q, grad_out, minus_lse, minus_delta, index, ids[0])


def _pieces(work: Work, head: int, ids: list[int], keys: int, buffers: Buffers) -> Iterator[_Piece]:
    """The query blocks `ids` in pieces whose scores with `keys` keys fit the budget."""
    size = max(1, SCORE_BYTES // (4 * work.block_q * keys))
    for start in range(0, len(ids), size):
        yield _piece(work, head, ids[start : start + size], buffers)


def _add_products(
    work: Work,
    dq: Tensor,
    piece: _Piece,
    keys: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    bias: Tensor | None,
    buffers: Buffers,
) -> None:
    """Add a piece's share to dq [Mq, block_q * D] and to the `grads` of k, v [n, D]; bias [blocks, n] or None."""
    (k, v), (dk, dv) = keys, grads
    shape = (piece.q.shape[0], k.shape[0])
    p, ds = buffers.get("p", *shape), buffers.get("ds", *shape)
    torch.addmm(piece.minus_lse, piece.q, k.t(), alpha=work.scale, out=p)
    if bias is not None:
        p.view(-1, work.block_q, shape[1]).add_(bias[:, None])
    p.exp_()
    torch.addmm(piece.minus_delta, piece.grad_out, v.t(), out=ds)
    ds.mul_(p)
    dv.addmm_(p.t(), piece.grad_out)
    dk.addmm_(ds.t(), piece.q)
    if piece.ids is None:
        blocks = shape[0] // work.block_q
        dq[piece.first : piece.first + blocks].view(shape[0], -1).addmm_(ds, k)
    else:
        new = torch.mm(ds, k, out=buffers.get("dq", shape[0], k.shape[1]))
        dq.index_add_(0, piece.ids, new.view(piece.ids.numel(), -1))


def _mean_grads(
    work: Work, means: Means, heads: range, kv_head: int, blocks: slice, part: int, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean keys and values [n, D] of some kv blocks, divided by the keys behind each."""
    k, v = means.k[kv_head, blocks], means.v[kv_head, blocks]
    dk, dv = (buffers.get(name, *k.shape).zero_() for name in ("mean_dk", "mean_dv"))
    rows = list(range(work.q.shape[1]))
    for head in heads:
        kept = work.plan.kept[head if work.plan.kept.shape[0] > 1 else 0, :, blocks]
        bias = torch.where(kept, float("-inf"), means.bias[blocks])
        for piece in _pieces(work, head, rows, k.shape[0], buffers):
            own = bias[piece.first : piece.first + piece.q.shape[0] // work.block_q]
            _add_products(work, work.dq[part, head], piece, (k, v), (dk, dv), own, buffers)
    share = means.per_key[blocks, None]
    return dk.mul_(work.scale * share), dv.mul_(share)


def kv_blocks(work: Work, kv_head: int, blocks: slice, part: int) -> Task:
    """The task that computes dk, dv of some kv blocks of a key head, and their share of dq."""
    rep = work.q.shape[0] // work.k.shape[0]
    heads = range(kv_head * rep, (kv_head + 1) * rep)

    def task(buffers: Buffers) -> None:
        work.dq[part, heads.start : heads.stop].zero_()
        means = None
        if work.means is not None:
            means = _mean_grads(work, work.means, heads, kv_head, blocks, part, buffers)
        for j in range(blocks.start, blocks.stop):
            own = slice(j * work.block_kv, min((j + 1) * work.block_kv, work.k.shape[1]))
            k, v = work.k[kv_head, own], work.v[kv_head, own]
            hidden = None
            if work.usable is not None and not bool(work.usable[own].all()):
                usable = work.usable[own]
                k, v, hidden = k[usable], v[usable], ~usable
            dk, dv = (buffers.get(name, *k.shape).zero_() for name in ("dk", "dv"))
            for head in heads:
                line = head if work.plan.q_counts.shape[0] > 1 else 0
                ids = work.plan.q_indices[line, j, : int(work.plan.q_counts[line, j])].tolist()
                for piece in _pieces(work, head, ids, k.shape[0], buffers) if k.shape[0] else ():
                    _add_products(work, work.dq[part, head], piece, (k, v), (dk, dv), None, buffers)
            dk.mul_(work.scale)
            for i, (result, grad) in enumerate(((work.dk, dk), (work.dv, dv))):
                if means is not None:
                    grad.add_(means[i][j - blocks.start])
                if hidden is None:
                    result[kv_head, own] = grad
                else:
                    result[kv_head, own] = 0
                    result[kv_head, own][~hidden] = grad.to(result.dtype)

    return task
