"""Means and second moments of the blocks of a sequence on the CPU, channel by channel.

    mean[J, d]     = sum_j x[j, d] / count[J]
    square[J, d]   = sum_j x[j, d]^2 / count[J]                     over the valid tokens j of block J;
    variance[J, d] = sum_j (x[j, d] - mean[J, d])^2 / count[J]      0 where there is none

The variance is that of x - x[first], with the first valid token of the block: m2 - m1^2 of these differences. The
common mean, which may be larger than the deviations by any factor, is gone before anything is squared, and one token
is at most sqrt(count) standard deviations away from the mean, so that the subtraction costs at most the factor count
of fp32's precision. Equal tokens have a variance of exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import workers
from .blocks import cdiv, valid_counts
from .workers import Buffers, Task

CHUNK_BYTES = 1 << 20  # of fp32 tokens that a task works on


def block_means(x: Tensor, block: int, kv_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 [B, H, M, D], the means of the blocks of x [B, H, S, D], and int32 [B or 1, M], their valid tokens.

    kv_mask: bool [B or 1, S], True where a token is valid. The last block may be partial.
    """
    count = valid_counts(x.shape[2], block, kv_mask, x.device)
    if kv_mask is not None:
        x = x.masked_fill(~kv_mask[:, None, :, None], 0)
    whole = x.shape[2] // block * block
    parts = [x[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=torch.float32)] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, whole:].sum(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2) / count.clamp(min=1)[:, None, :, None], count


def _first_valid(length: int, block: int, kv_mask: Tensor | None) -> Tensor:
    """int64 [B or 1, M], the first valid token of each block; any of the block's where there is none."""
    n_blocks = cdiv(length, block)
    start = torch.arange(n_blocks, dtype=torch.int64, device="cpu")[None] * block
    if kv_mask is None:
        return start
    padded = torch.nn.functional.pad(kv_mask, (0, n_blocks * block - length))
    return start + padded.view(-1, n_blocks, block).int().argmax(-1)


def second_moments(x: Tensor, block: int, kv_mask: Tensor | None, moment: str) -> Tensor:
    """fp32 [B, H, M, D], the "square" or the "variance" of each channel of each block of x [B, H, S, D].

    kv_mask: bool [B or 1, S], True where a token is valid; others are not read. The last block may be partial.
    Memory beyond the result: CHUNK_BYTES a worker, or one block.
    """
    batch, heads, length, dim = x.shape
    n_blocks, whole = cdiv(length, block), length // block
    count = valid_counts(length, block, kv_mask, x.device).clamp(min=1).float()
    first = _first_valid(length, block, kv_mask)
    out = torch.empty(batch, heads, n_blocks, dim, dtype=torch.float32, device="cpu")

    def chunk(b: int, h: int, start: int, end: int) -> Task:
        inside = slice(start * block, min(end * block, length))
        shared = b if first.shape[0] > 1 else 0

        def task(buffers: Buffers) -> None:
            tokens = x[b, h, inside].unflatten(0, (end - start, -1))  # [m, block, D]
            held = buffers.get("tokens", *tokens.shape)
            if moment == "variance":
                torch.sub(tokens, x[b, h, first[shared, start:end]].unsqueeze(1).float(), out=held)
            else:
                held.copy_(tokens)
            if kv_mask is not None:
                valid = kv_mask[b if kv_mask.shape[0] > 1 else 0, inside].view(end - start, -1, 1)
                held.masked_fill_(~valid, 0.0)
            n = count[shared, start:end, None]
            mean = held.sum(1) / n
            second = held.square_().sum(1) / n
            if moment == "variance":
                # What overflowed stays infinite instead of becoming inf - inf.
                second = torch.where(second.isinf(), second, (second - mean.square()).clamp(min=0.0))
            out[b, h, start:end] = second

        return task

    step = max(1, CHUNK_BYTES // (4 * block * dim))
    parts = [(start, min(start + step, whole)) for start in range(0, whole, step)]
    parts += [(whole, n_blocks)] * (whole < n_blocks)
    tasks = [chunk(b, h, *part) for b in range(batch) for h in range(heads) for part in parts]
    workers.run(tasks, [Buffers() for _ in range(workers.count())])
    return out
