"""CPU path of `block_mass`: a GEMM of some queries and keys, powers of two in place, and a weighted sum of rows.

With queries scaled by scale * log2(e), so that S = Q K^T are scores in base 2,

    mass of a block of queries on a key = sum over its queries of 2^-lse 2^S

Where norms bound S (`softmax_cpu.LIMIT`) and every lse is moderate, the two powers are taken apart: the sum is a
product with the vector of 2^-lse, which saves a pass over the scores. Else lse is subtracted from S beforehand.

Chunks of CHUNK_BYTES of scores run side by side (`workers`). Half precision is widened to fp32 chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import workers
from .mass_arguments import BlockMass
from .softmax_cpu import LIMIT, LOG2_E
from .workers import Buffers, Task

CHUNK_ROWS = 2048  # queries of a task, unless a block has more: each GEMM packs its operands anew
FEWEST_ROWS = 512  # of a task that is made smaller so that all workers have one
CHUNK_BYTES = 2 << 20  # scores that a task works on
LSE_LIMIT = 80.0  # e^-lse is in the range of fp32 up to here


def _widened(x: Tensor, name: str, buffers: Buffers) -> Tensor:
    """[n, D] in fp32, with last stride 1."""
    if x.dtype == torch.float32 and x.stride(-1) == 1:
        return x
    return buffers.get(name, *x.shape).copy_(x)


def _longest_keys(k: Tensor, buffers: list[Buffers]) -> Tensor:
    """fp32 [B, Hkv], the longest key of each head; NaN or inf where a key is."""
    longest = torch.empty(k.shape[:2], dtype=torch.float32, device="cpu")

    def task_of(b: int, h: int) -> Task:
        def task(_: Buffers) -> None:
            longest[b, h] = torch.linalg.vector_norm(k[b, h], dim=-1, dtype=torch.float32).amax()

        return task

    workers.run([task_of(b, h) for b in range(k.shape[0]) for h in range(k.shape[1])], buffers)
    return longest


def _rows(m: BlockMass, mask: Tensor | None, longest: Tensor, out: Tensor, buffers: Buffers) -> None:
    """Some whole blocks of queries of one head: q [n, D], k [Sk, D], lse [n] of `m`; fills out [blocks, Mk].

    mask: bool [Sk], True where a key counts. longest: norm of the longest key.
    """
    (n, dim), kv_len, blocks = m.q.shape, m.k.shape[0], out.shape[0]
    queries = buffers.get("queries", blocks * m.block_q, dim)
    queries[n:] = 0
    queries[:n].copy_(m.q).mul_(m.factor * LOG2_E)
    lse = torch.full((blocks * m.block_q,), float("inf"), dtype=torch.float64, device="cpu")
    lse[:n] = torch.where(m.lse.isfinite(), m.lse, float("inf"))
    norms = torch.linalg.vector_norm(queries, dim=-1) * longest
    plain = bool((((lse.abs() <= LSE_LIMIT) | lse.isinf()) & (norms <= LIMIT)).all())
    weights = lse.neg().exp_().float() if plain else queries.new_ones(lse.shape)
    weights = weights.view(blocks, 1, m.block_q)
    lse = lse.mul_(LOG2_E).float()[:, None]
    width = m.block_kv * max(1, CHUNK_BYTES // (4 * blocks * m.block_q * m.block_kv))
    sums = buffers.get("sums", blocks, 1, out.shape[1] * m.block_kv)
    sums[:, :, kv_len:] = 0
    for start in range(0, kv_len, width):
        keys = _widened(m.k[start : start + width], "keys", buffers)
        scores = buffers.get("scores", queries.shape[0], keys.shape[0])
        torch.mm(queries, keys.t(), out=scores)
        if not plain:
            scores.sub_(lse)
        scores.exp2_()
        sums[:, :, start : start + keys.shape[0]] = torch.bmm(weights, scores.view(blocks, m.block_q, -1))
    if mask is not None:
        sums[:, :, :kv_len].masked_fill_(~mask, 0.0)
    torch.sum(sums.view(blocks, -1, m.block_kv), -1, out=out)


def mass(m: BlockMass) -> Tensor:
    """fp32 [B, H, Mq, Mk] of CPU tensors; arguments as of the op, already checked.

    k may be fp32 whatever q is. Memory beyond the result, a worker: CHUNK_BYTES (or the scores of a pair of blocks),
    and CHUNK_ROWS queries.
    """
    batch, heads, n_q, n_kv = m.shape
    rep, kv_len = heads // m.k.shape[1], m.k.shape[2]
    out = torch.zeros(batch, heads, n_q, n_kv, dtype=torch.float32, device="cpu")
    if not kv_len:
        return out
    buffers = [Buffers() for _ in range(workers.count())]
    longest = _longest_keys(m.k, buffers)
    share = batch * heads * n_q * m.block_q // (2 * len(buffers))
    step = max(1, min(CHUNK_ROWS, max(FEWEST_ROWS, share)) // m.block_q)

    def chunk(b: int, h: int, i: int) -> Task:
        rows = slice(i * m.block_q, (i + step) * m.block_q)
        mask = None if m.kv_mask is None else m.kv_mask[b if m.kv_mask.shape[0] > 1 else 0]
        own = m._replace(q=m.q[b, h, rows], k=m.k[b, h // rep], lse=m.lse[b, h, rows])
        return lambda scratch: _rows(own, mask, longest[b, h // rep], out[b, h, i : i + step], scratch)

    tasks = [chunk(b, h, i) for b in range(batch) for h in range(heads) for i in range(0, n_q, step)]
    # The caller's autocast must not narrow the GEMMs in here.
    with torch.autocast("cpu", enabled=False):
        workers.run(tasks, buffers)
    return out.nan_to_num_(nan=0.0, posinf=float("inf"))
