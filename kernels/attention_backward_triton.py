"""Launcher of the Triton backward kernels of block-sparse attention."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ._launch import (
    capability,
    mean_operands,
    row_strides,
    shared_strides,
    sizes_of,
    tile_sizes,
    unit_last_stride,
    wrap_triton,
)
from .attention_arguments import Attention, Means, Results
from .attention_backward_triton_kernels import _dk_dv, _dq, _row_terms
from .blocks import in_range
from .means_backward_triton import _dmeans, launch_dmeans
from .tiles import BackwardTiles, choose_backward_tiles
from .transpose_plan import transpose_plan

KERNELS: tuple[Any, ...] = (_row_terms, _dq, _dk_dv, _dmeans)


def launch_backward(
    a: Attention, results: Results, means: Means | None = None, tiles: BackwardTiles | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous; arguments as of the op, already checked.

    `means`: of `means_of`, None for no compensation. `tiles` override the table of `tiles`.
    Raises PlanError if the device is too old, or the plan's blocks are not multiples of 16 up to 256.
    """
    (batch, heads, q_len, dim), (kv_heads, kv_len) = a.q.shape, a.k.shape[1:3]
    if tiles is None:
        half = a.q.dtype != torch.float32
        tiles = choose_backward_tiles(capability(a.q.device), half, dim, a.block_q, a.block_kv)
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
    wrap_triton(_dq)[(triton.cdiv(q_len, tiles.dq.block_m), batch * heads)](
        *(q, k, v, grad_out, lse2, delta, counts, indices, mask, *mean_tensors, dq, *numbers),
        *(*strides["q"], *strides["k"], *strides["v"], *strides["g"]),
        *(*row_strides(counts), *row_strides(indices), mask_stride, *mean_strides),
        **sizes,
        **flags,
        RAGGED=kv_len % a.block_kv != 0,
        **tile_sizes(tiles.dq),
    )

    q_counts, q_indices = transpose_plan(counts, indices, a.num_kv_blocks)
    dk, dv = (q.new_empty((batch, kv_heads, kv_len, dim)) for _ in range(2))
    wrap_triton(_dk_dv)[(triton.cdiv(kv_len, tiles.dk_dv.block_n), batch * kv_heads)](
        *(q, k, v, grad_out, lse2, delta, q_counts, q_indices, mask, *dmeans, dk, dv, *numbers, q_indices.shape[3]),
        *(*strides["q"], *strides["k"], *strides["v"], *strides["g"], *shared_strides(q_counts, 0, 1), mask_stride),
        **sizes,
        **flags,
        RAGGED=q_len % a.block_q != 0,
        **tile_sizes(tiles.dk_dv),
    )
    return dq, dk, dv
