"""CPU backward of block-sparse attention: for each kv block, the queries that read it in some large GEMMs.

For a kv block (k, v) and a piece of the query blocks of one head that read it, stacked to q, do [n, D]

    P  = exp(scale * q k^T - lse)          dv += P^T do
    dS = P * (do v^T - delta)              dk += dS^T q,  dq += dS k

with delta = rowsum(do * out) - dlse. Five GEMMs in fp32, as few as there can be; a piece's scores stay near 0.5 MB,
so both score matrices stay in a core's L2 cache. Queries are gathered only where a piece is not a run of
neighbouring blocks. A worker owns some kv blocks of a key head and adds to its own dq, and the dq of several
workers are summed in a fixed order: the result depends on the number of threads, not on their timing.
Compensation adds the mean keys of a worker's blocks, read by the rows that drop them, in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import workers
from .transpose_plan import block_mask, transpose_mask
from .workers import Buffers, Task

SCORE_BYTES = 512 << 10  # scores of one piece; there are two such matrices
COPY_BYTES_PER_WORKER = 32 << 20  # widened or re-laid copies held at a time


@dataclass
class _Means:
    """Mean keys and values of the blocks of one sample, some of its heads."""

    k: Tensor  # fp32 [hkv, Mk, D]
    v: Tensor
    bias: Tensor  # fp32 [Mk], log(n * compensate), added to the scores of a mean of n keys
    per_key: Tensor  # fp32 [Mk], 1 / n


@dataclass
class _Work:
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
    q_counts: Tensor  # int32 [h or 1, Mk], number of query blocks that read a kv block
    q_indices: Tensor  # int32 [h or 1, Mk, Mq], which ones
    means: _Means | None  # with compensation
    kept: Tensor  # bool [h or 1, Mq, Mk], blocks whose mean a row does not read
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


def _piece(work: _Work, head: int, ids: list[int], buffers: Buffers) -> _Piece:
    blocks, width = len(ids), work.q.shape[-1]
    sources = (work.q[head], work.grad_out[head], work.minus_lse[head], work.minus_delta[head])
    if ids[-1] - ids[0] == blocks - 1:
        picked, index = [x[ids[0] : ids[-1] + 1] for x in sources], None
    else:
        index = torch.tensor(ids, device="cpu")
        shapes = ((blocks, width),) * 2 + ((blocks, work.block_q),) * 2
        picked = [
            torch.index_select(x, 0, index, out=buffers.get(f"piece{i}", *shape))
            for i, (x, shape) in enumerate(zip(sources, shapes, strict=True))
        ]
    rows = blocks * work.block_q
    q, grad_out, minus_lse, minus_delta = (x.view(rows, -1) for x in picked)
    return _Piece(q, grad_out, minus_lse, minus_delta, index, ids[0])


def _pieces(work: _Work, head: int, ids: list[int], keys: int, buffers: Buffers) -> Iterator[_Piece]:
    """The query blocks `ids` in pieces whose scores with `keys` keys fit the budget."""
    size = max(1, SCORE_BYTES // (4 * work.block_q * keys))
    for start in range(0, len(ids), size):
        yield _piece(work, head, ids[start : start + size], buffers)


def _add_products(
    work: _Work,
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
    work: _Work, means: _Means, heads: range, kv_head: int, blocks: slice, part: int, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean keys and values [n, D] of some kv blocks, divided by the keys behind each."""
    k, v = means.k[kv_head, blocks], means.v[kv_head, blocks]
    dk, dv = (buffers.get(name, *k.shape).zero_() for name in ("mean_dk", "mean_dv"))
    rows = list(range(work.q.shape[1]))
    for head in heads:
        kept = work.kept[head if work.kept.shape[0] > 1 else 0, :, blocks]
        bias = torch.where(kept, float("-inf"), means.bias[blocks])
        for piece in _pieces(work, head, rows, k.shape[0], buffers):
            own = bias[piece.first : piece.first + piece.q.shape[0] // work.block_q]
            _add_products(work, work.dq[part, head], piece, (k, v), (dk, dv), own, buffers)
    share = means.per_key[blocks, None]
    return dk.mul_(work.scale * share), dv.mul_(share)


def _kv_blocks(work: _Work, kv_head: int, blocks: slice, part: int) -> Task:
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
                line = head if work.q_counts.shape[0] > 1 else 0
                ids = work.q_indices[line, j, : int(work.q_counts[line, j])].tolist()
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


def _split(q_counts: Tensor, parts: int) -> list[slice]:
    """Ranges of kv blocks of about the same work, at most `parts`; q_counts [h, Mk]."""
    work = q_counts.sum(0) + 1
    part = (work.cumsum(0) - work) * parts // int(work.sum())
    sizes = [n for n in torch.bincount(part, minlength=parts).tolist() if n]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]


def _padded(x: Tensor, length: int, name: str, buffers: Buffers) -> tuple[Tensor, list[Task]]:
    """[h, S, D] of any dtype and strides as contiguous fp32 [h, length, D], zeros at the end, and how to fill it.

    `x` itself, and no task, if it is that already.
    """
    if x.dtype == torch.float32 and x.is_contiguous() and x.shape[1] == length:
        return x, []
    padded = buffers.get(name, x.shape[0], length, x.shape[2])

    def copy(h: int) -> Task:
        def task(_: Buffers) -> None:
            padded[h, : x.shape[1]] = x[h]
            padded[h, x.shape[1] :] = 0

        return task

    return padded, [copy(h) for h in range(x.shape[0])]


def _row_terms(
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor, minus_lse: Tensor, minus_delta: Tensor
) -> list[Task]:
    """Tasks that fill minus_lse and minus_delta [h, padded Sq] from [h, Sq(, D)] tensors, one a head."""

    def rows(h: int) -> Task:
        def task(buffers: Buffers) -> None:
            length, dim = out.shape[1:]
            minus_lse[h].fill_(float("-inf"))
            torch.where(torch.isneginf(lse[h]), lse[h], -lse[h], out=minus_lse[h, :length])
            product = buffers.get("product", length, dim).copy_(out[h]).mul_(grad_out[h])
            minus_delta[h].zero_()
            torch.sub(grad_lse[h], product.sum(-1), out=minus_delta[h, :length])

        return task

    return [rows(h) for h in range(out.shape[0])]


def _heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    mask: Tensor,
    transposed: tuple[Tensor, Tensor],
    scale: float,
    blocks: tuple[int, int],
    usable: Tensor | None,
    means: _Means | None,
    results: tuple[Tensor, Tensor, Tensor],
    buffers: list[Buffers],
) -> None:
    """Some heads of one sample: q, out, grad_out [h, Sq, D], k and v [hkv, Sk, D], mask bool [h or 1, Mq, Mk].

    `transposed` are q_counts and q_indices of the mask. Fills dq, dk, dv = `results`.
    """
    (heads, q_len, dim), kv_heads = q.shape, k.shape[0]
    block_q, block_kv = blocks
    n_q = mask.shape[1]
    shared = buffers[-1]
    queries, fill_q = _padded(q, n_q * block_q, "queries", shared)
    grads, fill_g = _padded(grad_out, n_q * block_q, "grads", shared)
    in_rows = k.dtype == torch.float32 and k.stride(2) == v.stride(2) == 1
    keys, fill_k = (k, []) if in_rows else _padded(k, k.shape[1], "keys", shared)
    values, fill_v = (v, []) if in_rows else _padded(v, v.shape[1], "values", shared)
    minus_lse, minus_delta = (shared.get(name, heads, n_q * block_q) for name in ("lse", "delta"))
    workers.run(
        fill_q + fill_g + fill_k + fill_v + _row_terms(out, lse, grad_out, grad_lse, minus_lse, minus_delta), buffers
    )

    parts = 1 if workers.count() == 1 else -(-2 * workers.count() // kv_heads)
    ranges = _split(transposed[0], parts)
    dq, dk, dv = results
    in_place = len(ranges) == 1 and dq.dtype == torch.float32 and n_q * block_q == q_len
    sums = dq.view(1, heads, n_q, -1) if in_place else shared.get("dq", len(ranges), heads, n_q, block_q * dim)
    work = _Work(
        q=queries.view(heads, n_q, block_q * dim),
        grad_out=grads.view(heads, n_q, block_q * dim),
        minus_lse=minus_lse.view(heads, n_q, block_q),
        minus_delta=minus_delta.view(heads, n_q, block_q),
        dq=sums,
        k=keys,
        v=values,
        dk=dk,
        dv=dv,
        usable=usable,
        q_counts=transposed[0],
        q_indices=transposed[1],
        means=means,
        kept=mask,
        block_q=block_q,
        block_kv=block_kv,
        scale=scale,
    )
    workers.run([_kv_blocks(work, g, own, i) for g in range(kv_heads) for i, own in enumerate(ranges)], buffers)

    def finish(h: int) -> Task:
        def task(_: Buffers) -> None:
            total = sums[0, h]
            for other in sums[1:, h]:
                total.add_(other)
            total.mul_(scale)
            if not in_place:
                dq[h] = total.view(-1, dim)[:q_len]

        return task

    workers.run([finish(h) for h in range(heads)], buffers)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None,
    compensate: Tensor | None,
    dropped_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, of CPU tensors; arguments as of the op, already validated.

    Memory beyond the output: copies of some heads (COPY_BYTES_PER_WORKER a worker, at least one key head and its
    query heads), and per worker the scores and the gathered queries of a piece.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    rep = heads // kv_heads
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (q, k, v))
    copied = 4 * dim * max(1, 3 * rep * q_len + 2 * kv_len)  # of one key head, in fp32
    step = max(1, COPY_BYTES_PER_WORKER * workers.count() // copied)
    # One per worker; the last one holds what all of them share.
    buffers = [Buffers() for _ in range(workers.count() + 1)]
    # The caller's autocast must not narrow the GEMMs in here.
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        mask = block_mask(kv_counts, kv_indices, -(-kv_len // block_kv))
        q_counts, q_indices = transpose_mask(mask)
        if dropped_only:
            q_counts = torch.zeros_like(q_counts)
        if compensate is not None:
            (mean_k, n), (mean_v, _) = (torch.ops.dynamicrad.pool_blocks(x, block_kv, kv_mask) for x in (k, v))
            mean_k, mean_v = mean_k.float(), mean_v.float()
            bias = (torch.log(n.float()) + torch.log(compensate)[:, None]).expand(batch, -1)
            per_key = (1.0 / n.clamp(min=1)).expand(batch, -1)
        for b in range(batch):
            b_plan = b if mask.shape[0] > 1 else 0
            usable = None if kv_mask is None else kv_mask[b if kv_mask.shape[0] > 1 else 0]
            for g in range(0, kv_heads, step):
                own, own_kv = slice(g * rep, (g + step) * rep), slice(g, g + step)
                planned = own if mask.shape[1] > 1 else slice(0, 1)
                means = None
                if compensate is not None:
                    means = _Means(mean_k[b, own_kv], mean_v[b, own_kv], bias[b], per_key[b])
                _heads(
                    *(q[b, own], k[b, own_kv], v[b, own_kv], out[b, own], lse[b, own]),
                    *(grad_out[b, own], grad_lse[b, own], mask[b_plan, planned]),
                    (q_counts[b_plan, planned], q_indices[b_plan, planned]),
                    *(scale, (block_q, block_kv), usable),
                    means,
                    (dq[b, own], dk[b, own_kv], dv[b, own_kv]),
                    buffers,
                )
    return dq, dk, dv
