"""The transposed plan: which query blocks read a kv block. Plain ATen operations, no wait for the device.

The backward over keys walks it as the forward walks the plan itself. Its width is the number of query blocks,
because a narrower one would depend on values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import block_mask

SORT_BYTES = 256 << 20  # of the sort; the heads of a larger plan are sorted one by one


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
