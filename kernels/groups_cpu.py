"""Groups of rows with the same number of active blocks, the unit of work of `attention_cpu`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import workers
from .means_cpu import BlockMeans
from .moments_cpu import BlockMoments
from .softmax_cpu import LOG2_E, Sums, is_plain
from .workers import Buffers, Task

SCORE_BYTES = 1 << 20  # scores of one group
CHUNK_TOKENS = 2048  # most keys at a time
TASK_QUERIES = 1024  # queries of one task, which shares its small operations
DIRECT_QUERIES = 256  # queries of dense rows handled together


@dataclass
class Rows:
    """Active blocks of the rows of some heads, for one sample."""

    ids: Tensor  # int64 [R, W], the row's blocks: full ones first, then partly masked ones
    count: Tensor  # int64 [R], blocks with at least one usable key
    partial: Tensor  # int64 [R], how many of them are partly masked
    plan: tuple[Tensor, Tensor]  # counts [R] and indices [R, W] as they came

    def of(self, some: Tensor, n: int) -> Rows:
        """The rows `some`, which have n blocks each."""
        counts, indices = self.plan
        return Rows(self.ids[some, :n], self.count[some], self.partial[some], (counts[some], indices[some]))


@dataclass
class Work:
    """Some heads of one sample, as contiguous fp32 blocks."""

    queries: Tensor  # [h * Mq, block_q, D]
    keys: Tensor  # [hkv * Mk, block_kv, D]
    values: Tensor  # [hkv * Mk, block_kv, D]
    out: Tensor  # [h * Mq, block_q, D]
    lse: Tensor  # [h * Mq, block_q]
    usable: Tensor | None  # bool [Mk, block_kv]; None: all keys
    norms: Tensor  # [hkv], see softmax_cpu.key_norms
    means: BlockMeans | None  # with compensation
    moments: BlockMoments | None  # with covariances
    kv_len: int
    scale: float


def rows_of(counts: Tensor, indices: Tensor, n_kv: int, usable: Tensor | None) -> Rows:
    """Rows of counts [h, Mq] and indices [h, Mq, W], in range; `usable` bool [n_kv, block_kv], None if all keys are."""
    count = counts.reshape(-1).long()
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
    return Rows(ids, count, partial, (counts.reshape(-1), indices.reshape(counts.numel(), -1)))


def _add_blocks(work: Work, q: Tensor, sums: Sums, ids: Tensor, line: Rows, at_once: int, buffers: Buffers) -> None:
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


def _add_dense(work: Work, q: Tensor, sums: Sums, first: int, n_kv: int, buffers: Buffers) -> None:
    """Add all keys of the n_kv blocks from `first` on, read in place, to rows of one head."""
    q, sums, dim = q.view(1, -1, q.shape[-1]), sums.flat(), q.shape[-1]
    keys, values = (x[first : first + n_kv].view(1, -1, dim)[:, : work.kv_len] for x in (work.keys, work.values))
    for start in range(0, work.kv_len, CHUNK_TOKENS):
        k, v = keys[:, start : start + CHUNK_TOKENS], values[:, start : start + CHUNK_TOKENS]
        sums.add(q, k, v, None, None, buffers)


def _add_means(means: BlockMeans, q: Tensor, sums: Sums, heads: list[int], bias: Tensor, buffers: Buffers) -> None:
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


def groups(work: Work, rows: Rows, n_q: int, n_kv: int, rep: int, masked: bool) -> list[Task]:
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
            if work.means is not None and bias is not None:
                _add_means(work.means, q, sums, heads[start:stop], bias, buffers)
                if work.moments is not None:
                    work.moments.correct(q, sums, own, buffers)
            if n == n_kv and not masked:
                _add_dense(work, q, sums, heads[start] * n_kv, n_kv, buffers)
            elif n > 0:
                _add_blocks(work, q, sums, line.ids + head[:, None] * n_kv, line, at_once, buffers)
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
