"""CPU path of block-sparse attention: gather the active blocks of some rows, then two batched GEMMs.

For a group of (head, query block) rows with the same number of active blocks, one chunk of keys after the other,

    S = Q K[ids]^T        bmm, fp32, Q scaled
    P = 2^(S - shift)     in place; the shift is 0 where norms allow it (`cpu_softmax`)
    O += P V[ids]         baddbmm

and, with compensation, the mean keys and values of the dropped blocks as a last chunk (`cpu_means`).

Everything is plain eager PyTorch: nothing is compiled, so there is no compiler to look for, no recompilation
when a length changes, and no wait at the first call. The scores of a chunk are kept near 1 MB. Groups run side by
side, one core each (`workers`).
Half precision inputs are widened to fp32, so the result is as exact as the rounding of the output allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import workers
from .means_cpu import BlockMeans
from .softmax_cpu import LOG2_E, Sums, is_plain, key_norms
from .workers import Buffers, Task

SCORE_BYTES = 1 << 20  # scores of one group
COPY_BYTES_PER_WORKER = 8 << 20  # widened or re-laid copies of keys and values held at a time
CHUNK_TOKENS = 2048  # most keys at a time
TASK_QUERIES = 1024  # queries of one task, which shares its small operations
DIRECT_QUERIES = 256  # queries of dense rows handled together


@dataclass
class _Rows:
    """Active blocks of the rows of some heads, for one sample."""

    ids: torch.Tensor  # int64 [R, W], the row's blocks: full ones first, then partly masked ones
    count: torch.Tensor  # int64 [R], blocks with at least one usable key
    partial: torch.Tensor  # int64 [R], how many of them are partly masked
    plan: tuple[torch.Tensor, torch.Tensor]  # counts [R] and indices [R, W] as they came

    def of(self, some: torch.Tensor, n: int) -> _Rows:
        """The rows `some`, which have n blocks each."""
        counts, indices = self.plan
        return _Rows(self.ids[some, :n], self.count[some], self.partial[some], (counts[some], indices[some]))


@dataclass
class _Work:
    """Some heads of one sample, as contiguous fp32 blocks."""

    queries: torch.Tensor  # [h * Mq, block_q, D]
    keys: torch.Tensor  # [hkv * Mk, block_kv, D]
    values: torch.Tensor  # [hkv * Mk, block_kv, D]
    out: torch.Tensor  # [h * Mq, block_q, D]
    lse: torch.Tensor  # [h * Mq, block_q]
    usable: torch.Tensor | None  # bool [Mk, block_kv]; None: all keys
    norms: torch.Tensor  # [hkv], see cpu_softmax.key_norms
    means: BlockMeans | None  # with compensation
    kv_len: int
    scale: float


def _rows(
    counts: torch.Tensor, indices: torch.Tensor, n_kv: int, usable: torch.Tensor | None, dropped_only: bool
) -> _Rows:
    """Rows of counts [h, Mq] and indices [h, Mq, W]; `usable` bool [n_kv, block_kv] or None if all keys are.

    With `dropped_only` no row reads a block, and its plan still tells which means it adds.
    """
    count = counts.reshape(-1).long().clamp(max=0 if dropped_only else n_kv)
    ids = indices.reshape(count.numel(), -1).long()
    dense = count == n_kv
    if bool(dense.any()):
        ids = torch.nn.functional.pad(ids, (0, max(0, n_kv - ids.shape[1])))[:, :n_kv]
        ids = torch.where(dense[:, None], torch.arange(n_kv, device="cpu"), ids)
    partial = torch.zeros_like(count)
    if usable is not None and ids.shape[1] > 0:
        keys = usable.sum(-1)
        rank = torch.where(keys == usable.shape[1], 0, torch.where(keys > 0, 1, 2))
        active = torch.arange(ids.shape[1], device="cpu") < count[:, None]
        rank = torch.where(active, rank[torch.where(active, ids, 0)], 3)
        rank, order = rank.sort(dim=-1, stable=True)
        ids, count, partial = ids.gather(1, order), (rank < 2).sum(-1), (rank == 1).sum(-1)
    return _Rows(ids, count, partial, (counts.reshape(-1), indices.reshape(counts.numel(), -1)))


def _add_blocks(
    work: _Work, q: torch.Tensor, sums: Sums, ids: torch.Tensor, line: _Rows, at_once: int, buffers: Buffers
) -> None:
    """Add the blocks ids [G, n] of work.keys to scaled q [G, bq, D], `at_once` rows at a time; line: these rows."""
    (block, dim), (group, n_blocks) = work.keys.shape[1:], ids.shape
    size = _chunk_blocks(n_blocks, block)
    for i in range(0, group, at_once):
        own_q, own = (q, sums) if at_once >= group else (q[i : i + at_once], sums.part(i, i + at_once))
        rows = own_q.shape[0]
        # Partly masked blocks come last in a row.
        first_partial = n_blocks
        if work.usable is not None:
            first_partial -= int(line.partial[i : i + at_once].max())
        for start in range(0, n_blocks, size):
            width = min(size, n_blocks - start)
            part = ids[i : i + at_once, start : start + width].reshape(-1)
            k = torch.index_select(work.keys, 0, part, out=buffers.get("k", rows * width, block, dim))
            v = torch.index_select(work.values, 0, part, out=buffers.get("v", rows * width, block, dim))
            mask, masked = None, max(first_partial, start)
            if work.usable is not None and masked < start + width:
                mask = work.usable[line.ids[i : i + at_once, masked : start + width]].flatten(1)
            own.add(own_q, k.view(rows, -1, dim), v.view(rows, -1, dim), mask, None, buffers)


def _chunk_blocks(n_blocks: int, block: int) -> int:
    """Blocks of a chunk, for chunks of about the same length and of CHUNK_TOKENS at most."""
    most = max(1, CHUNK_TOKENS // block)
    return -(-n_blocks // -(-n_blocks // most))


def _add_dense(work: _Work, q: torch.Tensor, sums: Sums, first: int, n_kv: int, buffers: Buffers) -> None:
    """Add all keys of the n_kv blocks from `first` on, read in place, to rows of one head."""
    q, sums, dim = q.view(1, -1, q.shape[-1]), sums.flat(), q.shape[-1]
    keys, values = (x[first : first + n_kv].view(1, -1, dim)[:, : work.kv_len] for x in (work.keys, work.values))
    for start in range(0, work.kv_len, CHUNK_TOKENS):
        k, v = keys[:, start : start + CHUNK_TOKENS], values[:, start : start + CHUNK_TOKENS]
        sums.add(q, k, v, None, None, buffers)


def _add_means(
    means: BlockMeans, q: torch.Tensor, sums: Sums, heads: list[int], bias: torch.Tensor, buffers: Buffers
) -> None:
    """Add the means with bias [G, Mk padded] to the rows q [G, bq, D] of key/value `heads` [G]."""
    start = 0
    while start < len(heads):
        head, stop = heads[start], start + 1
        while stop < len(heads) and heads[stop] == head:
            stop += 1
        flat, own = q[start:stop].view(1, -1, q.shape[-1]), sums.part(start, stop).flat()
        for j in range(0, bias.shape[1], CHUNK_TOKENS):
            some = slice(j, j + CHUNK_TOKENS)
            k, v = means.keys[head : head + 1, some], means.values[head : head + 1, some]
            own.add(flat, k, v, None, bias[start:stop, some], buffers)
        start = stop


def _groups(work: _Work, rows: _Rows, n_q: int, n_kv: int, rep: int, masked: bool) -> list[Task]:
    """One task per group of query blocks; `rep` query heads share a key/value head."""
    items, block_q = work.queries.shape[:2]
    block_kv = work.keys.shape[1]
    item = torch.arange(items, device="cpu")
    row = item if rows.count.numel() == items else item % n_q  # heads may share their rows
    count, kv_head = rows.count[row], item // n_q // rep
    order = torch.argsort(count, descending=True, stable=True)  # longest first, for balance
    counts, heads = count[order].tolist(), kv_head[order].tolist()

    def group(start: int, stop: int, n: int, at_once: int) -> Task:
        def task(buffers: Buffers) -> None:
            own = order[start:stop]
            head, line = kv_head[own], rows.of(row[own], n)
            bias = None if work.means is None else work.means.row_bias(*line.plan)
            if n == 0 and bias is None:
                work.out[own], work.lse[own] = 0.0, float("-inf")
                return
            q = torch.index_select(work.queries, 0, own).mul_(work.scale * LOG2_E)
            plain = is_plain(q, work.norms[head]) and (bias is None or work.means is None or work.means.plain)
            sums = Sums.zeros(q.shape, plain, buffers)
            if n == n_kv and not masked:
                _add_dense(work, q, sums, heads[start] * n_kv, n_kv, buffers)
            elif n > 0:
                _add_blocks(work, q, sums, line.ids + head[:, None] * n_kv, line, at_once, buffers)
            if work.means is not None and bias is not None:
                _add_means(work.means, q, sums, heads[start:stop], bias, buffers)
            out, lse = sums.finish()
            work.out.index_copy_(0, own, out)
            work.lse.index_copy_(0, own, lse)

        return task

    most = max(1, min(TASK_QUERIES // block_q, items // (4 * workers.count())))
    tasks, start = [], 0
    while start < items:
        n, limit, at_once = counts[start], most, most
        direct = n == n_kv > 0 and not masked  # dense rows of one head only
        if direct:
            limit = max(1, DIRECT_QUERIES // block_q)
        elif n > 0:
            at_once = max(1, SCORE_BYTES // (4 * block_q * block_kv * _chunk_blocks(n, block_kv)))
            limit = max(limit, at_once)
        stop = start + 1
        while stop < min(start + limit, items) and counts[stop] == n and not (direct and heads[stop] != heads[start]):
            stop += 1
        tasks.append(group(start, stop, n, at_once))
        start = stop
    return tasks


def _to_blocks(
    x: torch.Tensor, block: int, n_blocks: int, name: str, buffers: Buffers
) -> tuple[torch.Tensor, list[Task]]:
    """[h, S, D] of any dtype and strides as contiguous fp32 [h * n_blocks, block, D], and the tasks that fill it.

    A view, and no task, if `x` is that already; the last block is padded with zeros.
    """
    heads, length, dim = x.shape
    if n_blocks * block == length and x.dtype == torch.float32 and x.is_contiguous():
        return x.view(heads * n_blocks, block, dim), []
    padded = buffers.get(name, heads, n_blocks * block, dim)

    def copy(h: int) -> Task:
        def task(_: Buffers) -> None:
            padded[h, :length] = x[h]
            padded[h, length:] = 0

        return task

    return padded.view(heads * n_blocks, block, dim), [copy(h) for h in range(heads)]


def _heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
    mask: torch.Tensor | None,
    compensate: float,
    dropped_only: bool,
    out: torch.Tensor,
    lse: torch.Tensor,
    buffers: list[Buffers],
) -> None:
    """Some heads of one sample: q [h, Sq, D], k and v [hkv, Sk, D], counts [h or 1, Mq], mask [Sk] or None.

    Fills out [h, Sq, D], contiguous, dtype of q, and lse fp32 [h, Sq].
    """
    heads, q_len, dim = q.shape
    n_q, kv_len = counts.shape[-1], k.shape[1]
    n_kv = -(-kv_len // block_kv)
    shared = buffers[-1]
    queries, fill_q = _to_blocks(q, block_q, n_q, "queries", shared)
    keys, fill_k = _to_blocks(k, block_kv, n_kv, "keys", shared)
    values, fill_v = _to_blocks(v, block_kv, n_kv, "values", shared)
    in_place = n_q * block_q == q_len and q.dtype == torch.float32
    rows_out = out if in_place else shared.get("out", heads, n_q * block_q, dim)
    rows_lse = lse if in_place else shared.get("lse", heads, n_q * block_q)
    usable = None
    if mask is not None or kv_len % block_kv:
        usable = torch.zeros(n_kv * block_kv, dtype=torch.bool, device="cpu")
        usable[:kv_len] = True if mask is None else mask
        usable = usable.view(n_kv, block_kv)
    kv_heads = k.shape[0]
    norms, means, fill_means = torch.empty(kv_heads, device="cpu"), None, []
    workers.run(fill_q + fill_k + fill_v, buffers)
    if n_kv > 0:
        if compensate > 0:
            valid = None if mask is None else usable
            means = BlockMeans(keys, values, valid, kv_heads, kv_len, compensate, k.dtype, shared)
            fill_means = means.fill()
        longest = key_norms(keys.view(kv_heads, -1, dim), values.view(kv_heads, -1, dim), norms)
        workers.run(longest + fill_means, buffers)
    blocks_out, blocks_lse = rows_out.view(-1, block_q, dim), rows_lse.view(-1, block_q)
    work = _Work(queries, keys, values, blocks_out, blocks_lse, usable, norms, means, kv_len, scale)
    rows = _rows(counts, indices, n_kv, usable, dropped_only)
    workers.run(_groups(work, rows, n_q, n_kv, heads // kv_heads, mask is not None), buffers)

    def copy_out(h: int) -> Task:
        def task(_: Buffers) -> None:
            out[h], lse[h] = rows_out[h, :q_len], rows_lse[h, :q_len]

        return task

    if not in_place:
        workers.run([copy_out(h) for h in range(heads)], buffers)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_counts: torch.Tensor,
    kv_indices: torch.Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
    kv_mask: torch.Tensor | None,
    compensate: torch.Tensor | None = None,
    dropped_only: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-sparse attention of CPU tensors; arguments as of the op, already validated.

    Memory beyond the output: copies of some heads (COPY_BYTES_PER_WORKER a worker, at least one key/value
    head) and, per worker, the scores, keys and values of a group.
    """
    batch, heads, q_len, _ = q.shape
    rep = heads // k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device="cpu")
    copied = 8 * max(1, k.shape[2] * k.shape[3])  # keys and values of one head in fp32
    step = rep * max(1, COPY_BYTES_PER_WORKER * workers.count() // copied)
    # One per worker; the last one holds what all of them share.
    buffers = [Buffers() for _ in range(workers.count() + 1)]
    # The caller's autocast must not narrow the GEMMs in here.
    with torch.autocast("cpu", enabled=False):
        for b in range(batch):
            b_plan = b if kv_counts.shape[0] > 1 else 0
            mask = None if kv_mask is None else kv_mask[b if kv_mask.shape[0] > 1 else 0]
            weight = 0.0 if compensate is None else float(compensate[b if compensate.shape[0] > 1 else 0])
            for h in range(0, heads, step):
                own, own_kv = slice(h, h + step), slice(h // rep, (h + step) // rep)
                planned = own if kv_counts.shape[1] > 1 else slice(0, 1)
                _heads(
                    q[b, own],
                    k[b, own_kv],
                    v[b, own_kv],
                    kv_counts[b_plan, planned],
                    kv_indices[b_plan, planned],
                    scale,
                    block_q,
                    block_kv,
                    mask,
                    weight,
                    dropped_only,
                    out[b, own],
                    lse[b, own],
                    buffers,
                )
    return out, lse
