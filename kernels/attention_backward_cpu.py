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

import torch
from torch import Tensor

from . import workers
from .attention_arguments import Attention, Results
from .blocks import block_mask
from .means import pooled
from .pieces_cpu import Means, Plan, Work, kv_blocks
from .transpose_plan import transpose_mask
from .workers import Buffers, Task

COPY_BYTES_PER_WORKER = 32 << 20  # widened or re-laid copies held at a time


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


def _row_terms(results: Results, minus_lse: Tensor, minus_delta: Tensor) -> list[Task]:
    """Tasks that fill minus_lse and minus_delta [h, padded Sq] from [h, Sq(, D)] tensors, one a head."""
    out, lse, grad_out, grad_lse = results

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
    a: Attention, results: Results, plan: Plan, means: Means | None, grads: tuple[Tensor, ...], buffers: list[Buffers]
) -> None:
    """Fill `grads`, dq, dk, dv, of some heads of one sample; tensors of `a` and `results` have no batch dimension."""
    (heads, q_len, dim), kv_heads = a.q.shape, a.k.shape[0]
    n_q = plan.kept.shape[1]
    shared = buffers[-1]
    queries, fill_q = _padded(a.q, n_q * a.block_q, "queries", shared)
    grad_out, fill_g = _padded(results.grad_out, n_q * a.block_q, "grads", shared)
    in_rows = a.k.dtype == torch.float32 and a.k.stride(2) == a.v.stride(2) == 1
    keys, fill_k = (a.k, []) if in_rows else _padded(a.k, a.k.shape[1], "keys", shared)
    values, fill_v = (a.v, []) if in_rows else _padded(a.v, a.v.shape[1], "values", shared)
    minus_lse, minus_delta = (shared.get(name, heads, n_q * a.block_q) for name in ("lse", "delta"))
    workers.run(fill_q + fill_g + fill_k + fill_v + _row_terms(results, minus_lse, minus_delta), buffers)

    parts = 1 if workers.count() == 1 else -(-2 * workers.count() // kv_heads)
    ranges = _split(plan.q_counts, parts)
    dq, dk, dv = grads
    in_place = len(ranges) == 1 and dq.dtype == torch.float32 and n_q * a.block_q == q_len
    sums = dq.view(1, heads, n_q, -1) if in_place else shared.get("dq", len(ranges), heads, n_q, a.block_q * dim)
    work = Work(
        q=queries.view(heads, n_q, a.block_q * dim),
        grad_out=grad_out.view(heads, n_q, a.block_q * dim),
        minus_lse=minus_lse.view(heads, n_q, a.block_q),
        minus_delta=minus_delta.view(heads, n_q, a.block_q),
        dq=sums,
        k=keys,
        v=values,
        dk=dk,
        dv=dv,
        usable=a.kv_mask,
        plan=plan,
        means=means,
        block_q=a.block_q,
        block_kv=a.block_kv,
        scale=a.factor,
    )
    workers.run([kv_blocks(work, g, own, i) for g in range(kv_heads) for i, own in enumerate(ranges)], buffers)

    def finish(h: int) -> Task:
        def task(_: Buffers) -> None:
            total = sums[0, h]
            for other in sums[1:, h]:
                total.add_(other)
            total.mul_(a.factor)
            if not in_place:
                dq[h] = total.view(-1, dim)[:q_len]

        return task

    workers.run([finish(h) for h in range(heads)], buffers)


def _means(a: Attention) -> list[Means | None]:
    """Means of all heads of each sample."""
    batch = a.q.shape[0]
    if a.compensate is None:
        return [None] * batch
    mean_k, mean_v, n = pooled(a)
    bias = (torch.log(n.float()) + torch.log(a.compensate)[:, None]).expand(batch, -1)
    per_key = (1.0 / n.clamp(min=1)).expand(batch, -1)
    return [Means(*each) for each in zip(mean_k.float(), mean_v.float(), bias, per_key, strict=True)]


def backward(a: Attention, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, of CPU tensors; arguments as of the op, already checked.

    Memory beyond the output: copies of some heads (COPY_BYTES_PER_WORKER a worker, at least one key head and its
    query heads), and per worker the scores and the gathered queries of a piece.
    """
    batch, heads, q_len, dim = a.q.shape
    kv_heads, kv_len = a.k.shape[1:3]
    rep = heads // kv_heads
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (a.q, a.k, a.v))
    copied = 4 * dim * max(1, 3 * rep * q_len + 2 * kv_len)  # of one key head, in fp32
    step = max(1, COPY_BYTES_PER_WORKER * workers.count() // copied)
    # One per worker; the last one holds what all of them share.
    buffers = [Buffers() for _ in range(workers.count() + 1)]
    # The caller's autocast must not narrow the GEMMs in here.
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        kept = block_mask(a.kv_counts, a.kv_indices, -(-kv_len // a.block_kv))
        plan, all_means = Plan(kept, *transpose_mask(kept)), _means(a)
        for b in range(batch):
            usable = None if a.kv_mask is None else a.kv_mask[b if a.kv_mask.shape[0] > 1 else 0]
            planned, means = Plan(*(x[b if kept.shape[0] > 1 else 0] for x in plan)), all_means[b]
            for g in range(0, kv_heads, step):
                own, own_kv = slice(g * rep, (g + step) * rep), slice(g, g + step)
                some = a._replace(q=a.q[b, own], k=a.k[b, own_kv], v=a.v[b, own_kv], kv_mask=usable)
                _heads(
                    some,
                    Results(*(x[b, own] for x in results)),
                    Plan(*(x[own] for x in planned)) if kept.shape[1] > 1 else planned,
                    None if means is None else means._replace(k=means.k[own_kv], v=means.v[own_kv]),
                    (dq[b, own], dk[b, own_kv], dv[b, own_kv]),
                    buffers,
                )
    return dq, dk, dv
