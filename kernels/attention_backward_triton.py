"""Launcher of the Triton backward kernels of block-sparse attention."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.library import wrap_triton

from .attention_backward_triton_kernels import _dk_dv, _dmeans, _dq, _row_terms
from .means import Means
from .tiles import BackwardTiles, Tile, choose_backward_tiles
from .transpose_plan import transpose_plan

MAX_SPLITS = 8  # of the queries in `_dmeans`; each holds fp32 gradients of all means
SPLIT_TILES = 64  # query tiles of a split, at least

KERNELS = (_row_terms, _dq, _dk_dv, _dmeans)

INTERPRETED = not isinstance(_dq, triton.runtime.JITFunction)
"""True if this module was loaded with TRITON_INTERPRET=1."""


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shared(x: torch.Tensor, *dims: int) -> tuple[int, ...]:
    """Strides, 0 where the size is 1 and the entry serves all."""
    return tuple(x.stride(d) if x.shape[d] > 1 else 0 for d in dims)


def _kernel(kernel: Any) -> Any:
    return kernel if INTERPRETED else wrap_triton(kernel)


def _launch(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def launch_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    kv_counts: torch.Tensor,
    kv_indices: torch.Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
    kv_mask: torch.Tensor | None = None,
    mask_start: int = 0,
    means: Means | None = None,
    tiles: BackwardTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous; arguments as of the op, already validated.

    `means`: of `compensation.means_of`, None for no compensation. `tiles` override the table of `tiles`.
    Raises PlanError if the device is too old, or the plan's blocks are not multiples of 16 up to 256.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if tiles is None:
        capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(q.device)
        tiles = choose_backward_tiles(capability, q.dtype != torch.float32, dim, block_q, block_kv)
    q, k, v, grad_out, kv_indices = (_unit_last_stride(x) for x in (q, k, v, grad_out, kv_indices))
    mask = kv_counts if kv_mask is None else _unit_last_stride(kv_mask)
    strides = {name: x.stride()[:3] for name, x in (("q", q), ("k", k), ("v", v), ("g", grad_out))}
    mask_strides = (0,) if kv_mask is None else _shared(mask, 0)
    sizes = {
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_Q": block_q,
        "WIDEN": INTERPRETED and q.dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    flags = {"BLOCK_KV": block_kv, "HAS_MASK": kv_mask is not None, "COMPENSATE": means is not None}

    lse2, delta = (q.new_empty((batch, heads, q_len), dtype=torch.float32) for _ in range(2))
    rows = 32
    _kernel(_row_terms)[(triton.cdiv(q_len, rows), batch * heads)](
        *(out.contiguous(), grad_out, lse.contiguous(), grad_lse.contiguous(), lse2, delta, heads, q_len),
        *strides["g"],
        D=dim,
        BLOCK_D=sizes["BLOCK_D"],
        BLOCK_M=rows,
    )

    mean_tensors: tuple[torch.Tensor, ...] = (mask,) * 5
    mean_strides: tuple[int, ...] = (0,) * 5
    dmeans = (delta, delta)
    if means is not None:
        bits = means.bits
        mean_tensors = (means.keys, means.values, means.counts, means.weight, bits)
        mean_strides = (*_shared(means.counts, 0), *_shared(means.weight, 0), *_shared(bits, 0, 1), bits.stride(2))
        n_means, n_tiles = means.keys.shape[2], triton.cdiv(q_len, tiles.dmeans.block_m)
        splits = max(1, min(MAX_SPLITS, n_tiles // SPLIT_TILES))
        parts = [q.new_empty((splits, batch, kv_heads, n_means, dim), dtype=torch.float32) for _ in range(2)]
        _kernel(_dmeans)[(triton.cdiv(n_means, tiles.dmeans.block_n), batch * kv_heads, splits)](
            *(q, grad_out, lse2, delta, *mean_tensors, *parts),
            *(scale, heads, heads // kv_heads, q_len, n_means, triton.cdiv(n_tiles, splits)),
            *(*strides["q"], *strides["g"], *mean_strides),
            **sizes,
            **_launch(tiles.dmeans),
        )
        per_key = means.counts.clamp(min=1).unsqueeze(1).unsqueeze(-1).reciprocal()
        dmeans = (parts[0].sum(0) * per_key, parts[1].sum(0) * per_key)

    dq = q.new_empty((batch, heads, q_len, dim))
    _kernel(_dq)[(triton.cdiv(q_len, tiles.dq.block_m), batch * heads)](
        *(q, k, v, grad_out, lse2, delta, kv_counts, kv_indices, mask, *mean_tensors, dq),
        *(scale, heads, heads // kv_heads, q_len, kv_len, mask_start),
        *(*strides["q"], *strides["k"], *strides["v"], *strides["g"]),
        *(*_shared(kv_counts, 0, 1), kv_counts.stride(2), *_shared(kv_indices, 0, 1), kv_indices.stride(2)),
        *(*mask_strides, *mean_strides),
        **sizes,
        **flags,
        RAGGED=kv_len % block_kv != 0,
        **_launch(tiles.dq),
    )

    q_counts, q_indices = transpose_plan(kv_counts, kv_indices, triton.cdiv(kv_len, block_kv))
    dk, dv = (q.new_empty((batch, kv_heads, kv_len, dim)) for _ in range(2))
    _kernel(_dk_dv)[(triton.cdiv(kv_len, tiles.dk_dv.block_n), batch * kv_heads)](
        *(q, k, v, grad_out, lse2, delta, q_counts, q_indices, mask, *dmeans, dk, dv),
        *(scale, heads, heads // kv_heads, q_len, kv_len, q_indices.shape[3]),
        *(*strides["q"], *strides["k"], *strides["v"], *strides["g"]),
        *(*_shared(q_counts, 0, 1), *mask_strides),
        **sizes,
        **flags,
        RAGGED=q_len % block_q != 0,
        **_launch(tiles.dk_dv),
    )
    return dq, dk, dv
