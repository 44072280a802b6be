"""How a sequence is cut into blocks, and what a plan's rows say about them.

Plain ATen operations without host synchronisation. None of x[..., None], x[..., :n] and x.contiguous(): while tracing
for CUDA they ask for a device, which the tracing machine may lack.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)


def valid_counts(length: int, block: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """int32 [B or 1, M], valid tokens of each block of a sequence of `length` tokens; mask bool [B or 1, length]."""
    n_blocks = cdiv(length, block)
    if mask is None:
        before = torch.arange(n_blocks, dtype=torch.int32, device=device) * -block
        return (before + length).clamp(max=block).unsqueeze(0)
    padded = torch.nn.functional.pad(mask, (0, n_blocks * block - length))
    return padded.reshape(mask.shape[0], n_blocks, block).sum(-1, dtype=torch.int32)


def in_range(kv_counts: Tensor, kv_indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    """The counts in 0..W, num_kv for a dense row, and the ids in 0..num_kv - 1: nothing is read out of range.

    Ops take counts and ids that were made when the graph runs, and can't look at them without waiting for the device.
    """
    width = kv_indices.shape[-1]
    counts = torch.where(kv_counts >= num_kv, num_kv, kv_counts.clamp(0, width))
    return counts, kv_indices.clamp(max=num_kv - 1).clamp(min=0)  # in this order, because num_kv may be 0


def block_mask(kv_counts: Tensor, kv_indices: Tensor, num_kv: int) -> Tensor:
    """bool [P, H', Mq, Mk] of counts [P, H', Mq] and indices [P, H', Mq, W]: True where the block pair is active.

    A row with count >= num_kv is dense, whatever its indices are. Wrong values are clamped (`in_range`).
    """
    kv_counts, kv_indices = in_range(kv_counts, kv_indices, num_kv)
    counts = kv_counts.unsqueeze(-1)
    active = torch.arange(kv_indices.shape[-1], device=kv_counts.device) < counts
    mask = torch.zeros((*kv_counts.shape, num_kv + 1), dtype=torch.bool, device=kv_counts.device)
    # Entries past the count go to a column that is cut off.
    mask = mask.scatter(-1, torch.where(active, kv_indices, num_kv).long(), True)
    return mask.narrow(-1, 0, num_kv) | (counts >= num_kv)
