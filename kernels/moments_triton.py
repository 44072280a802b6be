"""Launchers of the Triton kernels of `second_order_attention` (`moments_triton_kernels`)."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ._launch import INTERPRETED, shared_strides, sizes_of, unit_last_stride, wrap_triton
from .attention_arguments import Attention, Means
from .attention_triton import KERNELS as FORWARD
from .attention_triton import launch_forward
from .blocks import block_mask
from .means import means_of
from .moments import by_heads, row_weights
from .moments_triton_kernels import _block_moments, _second_order, _weigh_moments

KERNELS: tuple[Any, ...] = (*FORWARD, _block_moments, _weigh_moments, _second_order)
QUERIES = 64  # of a row at a time, at most


def columns_of(dim: int, half: bool) -> int:
    """BLOCK_E: columns of C and A of one program."""
    most = 128 if half and dim <= 128 else 64 if half or dim <= 128 else 32
    return min(most, max(16, triton.next_power_of_2(dim)))


def inner_of(dim: int) -> int:
    """BLOCK_K: rows of A at a time, where queries are multiplied with it."""
    return min(32, max(16, triton.next_power_of_2(dim)))


def block_sizes(dim: int, half: bool) -> dict[str, int]:
    """Of `_block_moments`. These and the next two: nothing spills (tests/kernels/test_moments_triton.py)."""
    return {
        "BLOCK_S": 32 if half else 16,
        "BLOCK_E": columns_of(dim, half),
        "num_warps": 4 if half and dim <= 64 else 8,
    }


def weigh_sizes(half: bool) -> dict[str, int]:
    """Of `_weigh_moments`."""
    return {"BLOCK_M": 64, "BLOCK_N": 128 if half else 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}


def query_sizes(dim: int, half: bool) -> dict[str, int]:
    """Of `_second_order`."""
    columns = columns_of(dim, half)
    return {"BLOCK_E": columns, "BLOCK_K": inner_of(dim), "num_warps": 4 if half and columns <= 64 else 8}


def launch_second_order(a: Attention) -> tuple[Tensor, Tensor]:
    """(out, lse) as of the op, whose arguments are already checked."""
    plain, reading_none = a._replace(compensate=None), a._replace(kv_counts=torch.zeros_like(a.kv_counts))
    kept, means = launch_forward(plain), means_of(a)
    dropped = launch_forward(reading_none, means)
    parts, first, first_kv = [], 0, 0
    for some in by_heads(a):
        heads, kv_heads = some.q.shape[1], some.k.shape[1]
        results = [x.narrow(1, first, heads) for x in (*kept, *dropped)]
        own = means._replace(keys=means.keys.narrow(1, first_kv, kv_heads))
        parts.append(_apply(some, *_moments_of_rows(some, own), results))
        first, first_kv = first + heads, first_kv + kv_heads
    if len(parts) == 1:
        return parts[0]
    out, lse = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return out, lse


def _wanted(a: Attention, weight: Tensor) -> Tensor:
    """int32 [B Hkv]: 1 where a row drops a block, and the sample's weight is positive."""
    batch, kv_heads = a.k.shape[:2]
    drops = (a.kv_counts < a.num_kv_blocks).any(-1).expand(batch, a.q.shape[1])
    return (drops.reshape(batch, kv_heads, -1).any(-1) & (weight > 0).unsqueeze(-1)).to(torch.int32).reshape(-1)


def _moments_of_rows(a: Attention, means: Means) -> tuple[Tensor, Tensor]:
    """(A [B, H, Mq, D, D], R fp32 [B, H, Mq, D]) of the heads of `a`."""
    (batch, kv_heads, keys, dim), heads, rows = a.k.shape, a.q.shape[1], a.kv_counts.shape[2]
    blocks, wanted = a.num_kv_blocks, _wanted(a, means.weight)
    k, v = unit_last_stride(a.k), unit_last_stride(a.v)
    mask = means.counts if a.kv_mask is None else unit_last_stride(a.kv_mask)
    narrow = torch.float32 if INTERPRETED or a.q.dtype == torch.float32 else torch.bfloat16
    both = k.new_empty((batch, kv_heads, blocks, dim, dim), dtype=narrow)
    variance = k.new_zeros((batch, kv_heads, blocks, dim), dtype=torch.float32)
    sizes = {name: value for name, value in sizes_of(k).items() if name != "WIDEN"}
    half = a.q.dtype != torch.float32
    columns = columns_of(dim, half)
    wrap_triton(_block_moments)[(blocks, triton.cdiv(dim, columns), batch * kv_heads)](
        *(k, v, means.counts, mask, wanted, both, variance, kv_heads, keys, blocks),
        *(*k.stride()[:3], *v.stride()[:3], *shared_strides(means.counts, 0)),
        0 if a.kv_mask is None else shared_strides(mask, 0)[0],
        **sizes,
        **block_sizes(dim, half),
        BLOCK_KV=a.block_kv,
        HAS_MASK=a.kv_mask is not None,
    )
    mean_q, _ = torch.ops.dynamicrad.pool_blocks(a.q, a.block_q, None)
    kept = block_mask(a.kv_counts, a.kv_indices, blocks).expand(batch, heads, -1, -1)
    weights = row_weights(
        mean_q.float().reshape(batch, kv_heads, -1, dim),
        means.keys.float(),
        means.counts,
        kept.reshape(batch, kv_heads, -1, blocks),
        a.factor,
    )
    products = k.new_empty((batch, heads, rows, dim, dim), dtype=narrow)
    number = weights.shape[2]
    tile = weigh_sizes(half)
    grid = triton.cdiv(number, tile["BLOCK_M"]), triton.cdiv(dim * dim, tile["BLOCK_N"]), batch * kv_heads
    wrap_triton(_weigh_moments)[grid](
        *(weights.contiguous(), both, wanted, products, number, blocks, dim * dim),
        **tile,
        PRECISION=sizes["PRECISION"],
    )
    return products, (weights @ variance).reshape(batch, heads, rows, dim)


def _apply(a: Attention, products: Tensor, squares: Tensor, results: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the heads of `a`; results: kept out and lse, dropped out and lse."""
    batch, heads, length, dim = a.q.shape
    q, tile = unit_last_stride(a.q), min(QUERIES, a.block_q & -a.block_q)
    out, lse = q.new_empty((batch, heads, length, dim)), q.new_empty((batch, heads, length), dtype=torch.float32)
    kept, kept_lse, dropped, dropped_lse = (x.contiguous() for x in results)
    half = q.dtype != torch.float32
    columns = columns_of(dim, half)
    grid = triton.cdiv(length, tile), triton.cdiv(dim, columns), batch * heads
    wrap_triton(_second_order)[grid](
        *(q, products, squares.contiguous(), kept, kept_lse, dropped, dropped_lse, out, lse),
        *(a.factor, heads, length, a.kv_counts.shape[2], *q.stride()[:3]),
        **{name: value for name, value in sizes_of(q).items() if name != "WIDEN"},
        **query_sizes(dim, half),
        BLOCK_Q=a.block_q,
        BLOCK_M=tile,
    )
    return out, lse
