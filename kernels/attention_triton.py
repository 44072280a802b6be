"""Launcher of the Triton forward kernel of block-sparse attention."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.library import wrap_triton

from .attention_triton_kernels import _block_sparse_forward
from .means import Means
from .quantise import mean_key, shift
from .quantise_triton import _quantise_rows, quantise_rows
from .schedule_triton import _heavy_first, heavy_first
from .splits_triton import _merge_splits, choose_splits, merge_splits
from .tiles import Tile, choose_tile

MEANS_TILE = 32
"""Means of blocks at a time; tiles of 64 spilled at head_dim 128 on sm_120."""

KERNELS = (_block_sparse_forward, _heavy_first, _quantise_rows, _merge_splits)

INTERPRETED = not isinstance(_block_sparse_forward, triton.runtime.JITFunction)
"""True if this module was loaded with TRITON_INTERPRET=1."""


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _kernel(kernel: Any) -> Any:
    return kernel if INTERPRETED else wrap_triton(kernel)


def _can_describe(x: torch.Tensor) -> bool:
    """Whether the copy engine can read x [B, H, S, D]: strides of 16 bytes, sizes known."""
    known = all(isinstance(n, int) for n in (*x.shape, *x.stride()))
    return known and x.stride(3) == 1 and all(s * x.element_size() % 16 == 0 and s > 0 for s in x.stride()[:3])


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_counts: torch.Tensor,
    kv_indices: torch.Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
    kv_mask: torch.Tensor | None = None,
    mask_start: int = 0,
    means: Means | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
    qk_int8: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as of the op, already validated.

    `means`: of `compensation.means_of`, None for no compensation. `tile` overrides the table of `tiles`, `splits`
    the rule of `choose_splits`. `qk_int8`: scores from int8 products (`quantise`).
    Raises PlanError if the device is too old, or the plan's blocks are not multiples of 16 up to 256.
    """
    batch, heads, q_len, dim = q.shape
    kv_len, rows = k.shape[2], kv_counts.shape[2]
    if tile is None:
        capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(q.device)
        tile = choose_tile(capability, q.dtype != torch.float32, dim, block_q, block_kv)
    q, k, v, kv_indices = (_unit_last_stride(x) for x in (q, k, v, kv_indices))
    programs = rows * (block_q // tile.block_m) * batch * heads
    if splits is None:
        units = 132 if INTERPRETED else torch.cuda.get_device_properties(q.device).multi_processor_count
        splits = choose_splits(programs, kv_indices.shape[3], units)
    out = v.new_empty((batch, heads, q_len, dim))
    lse = v.new_empty((batch, heads, q_len), dtype=torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts = v.new_empty((splits, *out.shape), dtype=torch.float32)
        part_lse = v.new_empty((splits, *lse.shape), dtype=torch.float32)
    mask = kv_counts if kv_mask is None else _unit_last_stride(kv_mask)
    order = heavy_first(kv_counts)

    full_q, mean = q, k
    scales = (part_lse,) * 3
    mean_keys = mask if means is None else means.keys
    if qk_int8:
        mean = mean_key(k)
        (q, q_scale), (k, k_scale) = quantise_rows(q), quantise_rows(k, mean)
        scales = (q_scale, k_scale, q_scale)
        if means is not None:
            mean_keys, mean_scale = quantise_rows(means.keys, mean)
            scales = (q_scale, k_scale, mean_scale)

    block_d = max(16, triton.next_power_of_2(dim))
    keys: Any = k
    values: Any = v
    tma = tile.tma and _can_describe(k) and _can_describe(v)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        keys, values = (TensorDescriptor.from_tensor(x, [1, 1, tile.block_n, block_d]) for x in (k, v))

    extra: tuple[torch.Tensor, ...] = (mask,) * 5
    if means is not None:
        extra = (mean_keys, means.values, means.counts, means.weight, means.bits)

    def stride(x: torch.Tensor, d: int) -> int:
        return x.stride(d) if x.shape[d] > 1 else 0  # size 1: shared

    def strides(means: Means) -> tuple[int, ...]:
        bits = means.bits
        return stride(means.counts, 0), stride(means.weight, 0), stride(bits, 0), stride(bits, 1), bits.stride(2)

    first_partial = kv_len // block_kv
    if kv_mask is not None:
        first_partial = min(first_partial, mask_start // block_kv)
    _kernel(_block_sparse_forward)[(programs, splits)](
        q,
        keys,
        values,
        *scales,
        kv_counts,
        kv_indices,
        kv_counts if order is None else order,
        mask,
        *extra,
        parts,
        part_lse,
        scale,
        batch * heads,
        heads,
        heads // k.shape[1],
        q_len,
        kv_len,
        rows,
        first_partial,
        mask_start,
        *(q.stride(0), q.stride(1), q.stride(2)),
        *(k.stride(0), k.stride(1), k.stride(2)),
        *(v.stride(0), v.stride(1), v.stride(2)),
        *(stride(kv_counts, 0), stride(kv_counts, 1), kv_counts.stride(2)),
        *(stride(kv_indices, 0), stride(kv_indices, 1), kv_indices.stride(2)),
        0 if kv_mask is None else stride(mask, 0),
        *((0, 0, 0, 0, 0) if means is None else strides(means)),
        D=dim,
        BLOCK_D=block_d,
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_J=min(MEANS_TILE, tile.block_n),
        RAGGED=kv_len % block_kv != 0,
        HAS_MASK=kv_mask is not None,
        COMPENSATE=means is not None,
        ORDERED=order is not None,
        SPLITS=splits,
        TMA=tma,
        QK8=qk_int8,
        WIDEN=INTERPRETED and v.dtype == torch.bfloat16,
        PRECISION="tf32x3" if v.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        merge_splits(parts, part_lse, out, lse)
    return out, lse + shift(full_q, mean, scale) if qk_int8 else lse
