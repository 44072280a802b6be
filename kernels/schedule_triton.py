"""Order in which the rows of a plan are handed to the multiprocessors: heavy rows first.

Text queries read every block, 5 times what a video row reads at 80 % sparsity. Handed out last they keep a few
multiprocessors busy while the others wait. `heavy_first` lists the rows with more than twice the mean count, then the
others in their order; the forward kernel starts the heavy rows of all heads before anything else and goes through the
rest head by head, so that the keys of a head stay in the L2 cache.

List scheduling on 132 multiprocessors of the plans of HunyuanVideo 480p (24 heads, 3 heavy rows of 258), CogVideoX (48
heads, 2 of 139) and a short video (12 heads, 1 of 66) leaves 92, 92 and 59 % of the multiprocessors' time used in the
natural order and 99, 99 and 91 % in this one (`benchmarks/schedule_model.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import wrap_triton

MAX_ROWS = 8192
"""Rows of a plan that one program orders; longer plans keep their natural order."""


@triton.jit
def _heavy_first(
    counts,  # int32 [Mq], of the first sample and head
    order,  # int32 [Mq + 1]: number of heavy rows, then all rows, heavy ones first
    MQ,
    stride,
    BLOCK: tl.constexpr,
):
    o_m = tl.arange(0, BLOCK)
    m_m = o_m < MQ
    b_count = tl.load(counts + o_m * stride, mask=m_m, other=0)
    total = tl.sum(b_count.to(tl.float32), 0)
    b_heavy = m_m & (b_count.to(tl.float32) * MQ > 2.0 * total)
    b_before = tl.cumsum(b_heavy.to(tl.int32), 0)  # heavy rows up to this one
    n_heavy = tl.sum(b_heavy.to(tl.int32), 0)
    b_place = tl.where(b_heavy, b_before - 1, n_heavy + o_m - b_before)
    tl.store(order, n_heavy)
    tl.store(order + 1 + b_place, o_m, mask=m_m)


def heavy_first(kv_counts: torch.Tensor) -> torch.Tensor | None:
    """int32 [Mq + 1] for counts [P, H', Mq]: the number of heavy rows, then all rows, heavy ones first.

    Only the counts of the first sample and head are read: text rows are the same in all. One launch, no wait for the
    device. None for one row, for more than MAX_ROWS, and for a number known only when the graph runs.
    """
    rows = kv_counts.shape[-1]
    if not isinstance(rows, int) or not 1 < rows <= MAX_ROWS:
        return None
    order = kv_counts.new_empty(rows + 1)
    block = triton.next_power_of_2(rows)
    wrap_triton(_heavy_first)[(1,)](
        kv_counts, order, rows, kv_counts.stride(-1), BLOCK=block, num_warps=max(1, min(8, block // 256))
    )
    return order
