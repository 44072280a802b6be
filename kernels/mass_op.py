"""The op `dynamicrad::block_mass`: how much of the attention each block of keys holds for each block of queries.

    A[I, J] = sum over queries i of I and keys j of J of exp(scale * q_i . k_j - lse_i)

fp32 [B, H, Mq, Mk]. With the lse of these queries and keys a row of A sums to the number of its queries, and A over
that number is what the block holds of the row's attention, exactly. It is the mass of AdaSpa's Fused LSE-Cached Search
(Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation", 2025): one product of
queries and keys and no value is read, given an lse, which may be that of an earlier denoising step; then rows may sum
to anything. A query whose lse is not finite (it had no key) adds nothing, and neither does a masked key. An entry that
is not a number counts as 0.

Keys may be their own blocks (block_kv = 1): with the mean keys of blocks the result is what these means would hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import mass_cpu
from .cost import Cost
from .define import HAS_TRITON, define, parameters_of
from .mass_arguments import BlockMass, check

if HAS_TRITON:
    from .mass_triton import KERNELS, launch_mass
else:
    KERNELS = ()


def _on_cuda(*arguments: Any) -> Tensor:
    m = BlockMass(*arguments)
    check(m)
    return launch_mass(m)


def _on_cpu(*arguments: Any) -> Tensor:
    m = BlockMass(*arguments)
    check(m)
    return mass_cpu.mass(m)


def _fake(*arguments: Any) -> Tensor:
    m = BlockMass(*arguments)
    check(m)
    return m.q.new_empty(m.shape, dtype=torch.float32)


define("block_mass", parameters_of(BlockMass), Tensor, cuda=_on_cuda, kernels=KERNELS, cpu=_on_cpu, fake=_fake)


def cost(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, head_dim: int, pairs: int, itemsize: int = 2
) -> Cost:
    """Cost of `block_mass` with `pairs` (query block, key block) pairs a head; `itemsize` is that of q and k in bytes.

    FLOPs: 2 * head_dim for each (query, key), half of what dense attention takes. Bytes: q, k and lse read, A written.
    """
    read = batch * (heads * q_len + kv_heads * kv_len) * head_dim * itemsize + 4 * batch * heads * q_len
    return Cost(2 * batch * heads * q_len * kv_len * head_dim, read + 4 * batch * heads * pairs)


@register_flop_formula([torch.ops.dynamicrad.block_mass, torch.ops.dynamicrad.block_mass_cpu])
def flops(q_shape: Any, k_shape: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the product of queries and keys."""
    (batch, heads, q_len, dim), (_, kv_heads, kv_len, _) = q_shape, k_shape
    return cost(batch, heads, kv_heads, q_len, kv_len, dim, 0).flops
