"""CPU path of block-sparse attention: gather the active blocks of some rows, then two batched GEMMs.

For a group of (head, query block) rows with the same number of active blocks, one chunk of keys after the other,

    S = Q K[ids]^T        bmm, fp32, Q scaled
    P = 2^(S - shift)     in place; the shift is 0 where norms allow it (`softmax_cpu`)
    O += P V[ids]         baddbmm

and, with compensation, the mean keys and values of the dropped blocks as a first chunk (`means_cpu`), which covariances
correct (`moments_cpu`). `groups_cpu` has the groups; here are the blocks that they read.

Everything is plain eager PyTorch: nothing is compiled, so there is no compiler to look for, no recompilation
when a length changes, and no wait at the first call. The scores of a chunk are kept near 1 MB. Groups run side by
side, one core each (`workers`).
Half precision inputs are widened to fp32, so the result is as exact as the rounding of the output allows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import workers
from .attention_arguments import Attention
from .blocks import in_range
from .groups_cpu import Work, groups, rows_of
from .means_cpu import BlockMeans
from .moments_cpu import BlockMoments, bytes_of_a_head
from .softmax_cpu import key_norms
from .workers import Buffers, Task

COPY_BYTES_PER_WORKER = 8 << 20  # widened or re-laid copies of keys and values held at a time


def _to_blocks(x: Tensor, block: int, n_blocks: int, name: str, buffers: Buffers) -> tuple[Tensor, list[Task]]:
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


def _heads(a: Attention, weight: float, covariance: bool, out: Tensor, lse: Tensor, buffers: list[Buffers]) -> None:
    """Some heads of one sample: the tensors of `a` have no batch dimension, `weight` is the sample's `compensate`.

    Fills out [h, Sq, D], contiguous, dtype of q, and lse fp32 [h, Sq]. Where no row drops a block, nothing is computed
    that stands for dropped ones.
    """
    (heads, q_len, dim), (kv_heads, kv_len) = a.q.shape, a.k.shape[:2]
    n_q, n_kv = a.kv_counts.shape[-1], -(-kv_len // a.block_kv)
    shared = buffers[-1]
    queries, fill_q = _to_blocks(a.q, a.block_q, n_q, "queries", shared)
    keys, fill_k = _to_blocks(a.k, a.block_kv, n_kv, "keys", shared)
    values, fill_v = _to_blocks(a.v, a.block_kv, n_kv, "values", shared)
    in_place = n_q * a.block_q == q_len and a.q.dtype == torch.float32
    rows_out = out if in_place else shared.get("out", heads, n_q * a.block_q, dim)
    rows_lse = lse if in_place else shared.get("lse", heads, n_q * a.block_q)
    usable = None
    if a.kv_mask is not None or kv_len % a.block_kv:
        usable = torch.zeros(n_kv * a.block_kv, dtype=torch.bool, device="cpu")
        usable[:kv_len] = True if a.kv_mask is None else a.kv_mask
        usable = usable.view(n_kv, a.block_kv)
    norms = torch.empty(kv_heads, device="cpu", dtype=torch.float32)
    means: BlockMeans | None = None
    moments: BlockMoments | None = None
    fill_means: list[Task] = []
    workers.run(fill_q + fill_k + fill_v, buffers)
    if n_kv > 0:
        if weight > 0 and bool((a.kv_counts < n_kv).any()):
            valid = None if a.kv_mask is None else usable
            means = BlockMeans(keys, values, valid, kv_heads, kv_len, weight, a.k.dtype, shared)
            fill_means = means.fill()
        longest = key_norms(keys.view(kv_heads, -1, dim), values.view(kv_heads, -1, dim), norms)
        workers.run(longest + fill_means, buffers)
        if covariance and means is not None:
            moments = BlockMoments(means, queries, heads, shared)
            workers.run(moments.weigh(a.kv_counts, a.kv_indices, q_len, a.factor), buffers)
            workers.run(moments.fill(keys, values, usable), buffers)
    blocks_out, blocks_lse = rows_out.view(-1, a.block_q, dim), rows_lse.view(-1, a.block_q)
    work = Work(queries, keys, values, blocks_out, blocks_lse, usable, norms, means, moments, kv_len, a.factor)
    rows = rows_of(a.kv_counts, a.kv_indices, n_kv, usable)
    workers.run(groups(work, rows, n_q, n_kv, heads // kv_heads, a.kv_mask is not None), buffers)

    def copy_out(h: int) -> Task:
        def task(_: Buffers) -> None:
            out[h], lse[h] = rows_out[h, :q_len], rows_lse[h, :q_len]

        return task

    if not in_place:
        workers.run([copy_out(h) for h in range(heads)], buffers)


def forward(a: Attention, covariance: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) of CPU tensors; arguments as of the op, already checked. `qk_int8` is not looked at.

    covariance: of `second_order_attention`.
    Memory beyond the output: copies of some heads, with what covariances take (COPY_BYTES_PER_WORKER a worker, at least
    one key/value head) and, per worker, the scores, keys and values of a group.
    """
    batch, heads, q_len, _ = a.q.shape
    rep = heads // a.k.shape[1]
    counts, indices = in_range(a.kv_counts, a.kv_indices, a.num_kv_blocks)
    out = torch.empty(a.q.shape, dtype=a.q.dtype, device="cpu")
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device="cpu")
    copied = 8 * max(1, a.k.shape[2] * a.k.shape[3])  # keys and values of one head in fp32
    if covariance:
        copied += bytes_of_a_head(a)
    step = rep * max(1, COPY_BYTES_PER_WORKER * workers.count() // copied)
    # One per worker; the last one holds what all of them share.
    buffers = [Buffers() for _ in range(workers.count() + 1)]
    # The caller's autocast must not narrow the GEMMs in here.
    with torch.autocast("cpu", enabled=False):
        for b in range(batch):
            plan = b if a.kv_counts.shape[0] > 1 else 0
            mask = None if a.kv_mask is None else a.kv_mask[b if a.kv_mask.shape[0] > 1 else 0]
            weight = 0.0 if a.compensate is None else float(a.compensate[b if a.compensate.shape[0] > 1 else 0])
            for h in range(0, heads, step):
                own, own_kv = slice(h, h + step), slice(h // rep, (h + step) // rep)
                planned = own if a.kv_counts.shape[1] > 1 else slice(0, 1)
                some = a._replace(
                    q=a.q[b, own],
                    k=a.k[b, own_kv],
                    v=a.v[b, own_kv],
                    kv_counts=counts[plan, planned],
                    kv_indices=indices[plan, planned],
                    kv_mask=mask,
                )
                _heads(some, weight, covariance, out[b, own], lse[b, own], buffers)
    return out, lse
