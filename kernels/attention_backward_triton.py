"""Launcher of the Triton backward kernels of block-sparse attention."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ._launch import (
    chip,
    launch_described,
    mean_operands,
    row_strides,
    shared_strides,
    sizes_of,
    tile_sizes,
    unit_last_stride,
    wrap_triton,
)
from .attention_arguments import Attention, Means, Results
from .attention_backward_triton_kernels import _dk_dv, _dq
from .blocks import in_range
from .means_backward_triton import _dmeans, launch_dmeans
from .row_terms_triton import _row_terms
from .tiles import BackwardTiles, Tile, choose_backward_tiles
from .transpose_plan import transpose_plan

MEANS_TILE = 32
"""Means of blocks at a time in `_dq`, whose loop over them would else need the most registers."""

KERNELS: tuple[Any, ...] = (_row_terms, _dq, _dk_dv, _dmeans)


def backward_tiles(a: Attention, variants: bool = True) -> BackwardTiles:
    """Tiles of the table for the op's arguments; `variants` as of `choose_backward_tiles`."""
    half = a.q.dtype != torch.float32
    return choose_backward_tiles(chip(a.q.device), half, a.q.shape[3], a.block_q, a.block_kv, variants)


def launch_backward(
    a: Attention, results: Results, means: Means | None = None, tiles: BackwardTiles | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous; arguments as of the op, already checked.

    `means`: of `means_of`, None for no compensation. `tiles`: those of the table's plain kernels if None. A variant
    runs only where its tensors can be described: else the plain kernel does, with its own tile.
    Raises PlanError if the device is too old, or the plan's blocks are not multiples of 16 up to 256.
    """
    (batch, heads, q_len, dim), (kv_heads, kv_len) = a.q.shape, a.k.shape[1:3]
    plain = backward_tiles(a, variants=False)
    tiles = tiles or plain
    q, k, v, grad_out = (unit_last_stride(x) for x in (a.q, a.k, a.v, results.grad_out))
    # Here and not in `_dq`, which has no register left for it.
    counts, indices = in_range(a.kv_counts, a.kv_indices, a.num_kv_blocks)
    indices = unit_last_stride(indices)
    mask = a.kv_counts if a.kv_mask is None else unit_last_stride(a.kv_mask)
    strides = {name: x.stride()[:3] for name, x in (("q", q), ("k", k), ("v", v), ("g", grad_out))}
    mask_stride = 0 if a.kv_mask is None else shared_strides(mask, 0)[0]
    numbers = (a.factor, heads, heads // kv_heads, q_len, kv_len)
    sizes = {**sizes_of(q), "BLOCK_Q": a.block_q}
    flags = {"BLOCK_KV": a.block_kv, "HAS_MASK": a.kv_mask is not None, "COMPENSATE": means is not None}

    lse2, delta = (q.new_empty((batch, heads, q_len), dtype=torch.float32) for _ in range(2))
    rows = 32
    wrap_triton(_row_terms)[(triton.cdiv(q_len, rows), batch * heads)](
        *(results.out.contiguous(), grad_out, results.lse.contiguous(), results.grad_lse.contiguous(), lse2, delta),
        *(heads, q_len, *strides["g"]),
        D=dim,
        BLOCK_D=sizes["BLOCK_D"],
        BLOCK_M=rows,
    )

    mean_tensors, mean_strides = mean_operands(means, mask)
    dmeans = (delta, delta)
    if means is not None:
        dmeans = launch_dmeans(a, means, (q, grad_out, lse2, delta), tiles.dmeans)

    dq = q.new_empty((batch, heads, q_len, dim))

    def launch_dq(tile: Tile, keys: Any, values: Any) -> None:
        tma = tile.kernel == "tma"
        wrap_triton(_dq, tma)[(triton.cdiv(q_len, tile.block_m), batch * heads)](
            *(q, keys, values, grad_out, lse2, delta, counts, indices, mask, *mean_tensors, dq, *numbers),
            *(*strides["q"], *strides["k"], *strides["v"], *strides["g"]),
            *(*row_strides(counts), *row_strides(indices), mask_stride, *mean_strides),
            **sizes,
            **flags,
            BLOCK_J=min(MEANS_TILE, tile.block_n),
            RAGGED=kv_len % a.block_kv != 0,
            TMA=tma,
            **tile_sizes(tile),
        )

    launch_described("dq", tiles.dq, plain.dq, tiles.dq.block_n, (k, v), launch_dq)

    q_counts, q_indices = transpose_plan(counts, indices, a.num_kv_blocks)
    dk, dv = (q.new_empty((batch, kv_heads, kv_len, dim)) for _ in range(2))

    def launch_dk_dv(tile: Tile, queries: Any, grads: Any) -> None:
        tma = tile.kernel == "tma"
        wrap_triton(_dk_dv, tma)[(triton.cdiv(kv_len, tile.block_n), batch * kv_heads)](
            *(queries, k, v, grads, lse2, delta, q_counts, q_indices, mask, *dmeans, dk, dv, *numbers),
            *(q_indices.shape[3], *strides["q"], *strides["k"], *strides["v"], *strides["g"]),
            *(*shared_strides(q_counts, 0, 1), mask_stride),
            **sizes,
            **flags,
            RAGGED=q_len % a.block_q != 0,
            TMA=tma,
            **tile_sizes(tile),
        )

    launch_described("dk_dv", tiles.dk_dv, plain.dk_dv, tiles.dk_dv.block_m, (q, grad_out), launch_dk_dv)
    return dq, dk, dv
