"""The transposed plan: which query blocks read a kv block. Plain ATen operations, no wait for the device.

The backward over keys walks it as the forward walks the plan itself. Its width is the number of query blocks,
because a narrower one would depend on values.
"""

from __future__ import annotations

import torch
from torch import Tensor

SORT_BYTES = 256 << 20  # of the sort; the heads of a larger plan are sorted one by one


def block_mask(kv_counts: Tensor, kv_indices: Tensor, num_kv: int) -> Tensor:
    """bool [P, H', Mq, Mk] of counts [P, H', Mq] and indices [P, H', Mq, W]: True where the block pair is active.

    A row with count >= num_kv is dense, whatever its indices are.
    """
    # No x[..., None], x[..., :n], x.contiguous(): while tracing for CUDA they ask for a device, which may be lacking.
    counts = kv_counts.unsqueeze(-1)
    active = torch.arange(kv_indices.shape[-1], device=kv_counts.device) < counts
    mask = torch.zeros((*kv_counts.shape, num_kv + 1), dtype=torch.bool, device=kv_counts.device)
    # Entries past the count go to a column that is cut off.
    mask = mask.scatter(-1, torch.where(active, kv_indices, num_kv).long(), True)
    return mask.narrow(-1, 0, num_kv) | (counts >= num_kv)


def transpose_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`transpose_plan` of a block mask bool [P, H', Mq, Mk]."""
    num_q = mask.shape[-2]
    columns = mask.transpose(-1, -2).clone(memory_format=torch.contiguous_format)  # [P, H', Mk, Mq]
    counts = columns.sum(-1, dtype=torch.int32)
    if isinstance(mask.numel(), int) and 16 * mask.numel() > SORT_BYTES and mask.shape[1] > 1:
        return counts, torch.cat([_ids(head, num_q) for head in columns.split(1, 1)], 1)
    return counts, _ids(columns, num_q)


def _ids(columns: Tensor, num_q: int) -> Tensor:
    """int32 [..., Mk, Mq]: the positions of True in each row of `columns`, ascending, then zeros."""
    number = torch.arange(num_q, dtype=torch.int32, device=columns.device)
    ids = torch.where(columns, number, num_q).sort(-1).values
    return torch.where(ids < num_q, ids, 0)


def transpose_plan(kv_counts: Tensor, kv_indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    """(q_counts int32 [P, H', Mk], q_indices int32 [P, H', Mk, Mq]) of counts [P, H', Mq], indices [P, H', Mq, W].

    q_indices lists the query blocks that read a kv block, ascending, then zeros. Dense rows of the plan are
    included and no row of the result is special: a count of Mq comes with all Mq ids.
    """
    return transpose_mask(block_mask(kv_counts, kv_indices, num_kv))
