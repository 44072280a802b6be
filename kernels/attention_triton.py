"""Launcher of the Triton forward kernel of block-sparse attention."""

from __future__ import annotations

from typing import Any

import torch

from dynamicrad_compile.errors import PlanError

from ._launch import (
    chip,
    instead,
    launch_described,
    mean_operands,
    multiprocessors,
    row_strides,
    shared_strides,
    sizes_of,
    tile_sizes,
    unit_last_stride,
    wrap_triton,
)
from .attention_arguments import Attention, Means
from .attention_gluon import CONSUMERS, launch_gluon
from .attention_triton_kernels import _block_sparse_forward
from .chip import name_of
from .quantise import mean_key, shift
from .quantise_triton import _quantise_rows, quantise_rows
from .schedule_triton import _heavy_first, heavy_first
from .splits_triton import _merge_splits, choose_splits, merge_splits
from .tiles import Tile, choose_tile, variant_in_use

MEANS_TILE = 32
"""Means of blocks at a time; tiles of 64 spilled at head_dim 128 on sm_120."""

KERNELS: tuple[Any, ...] = (_block_sparse_forward, _heavy_first, _quantise_rows, _merge_splits)


def forward_tile(a: Attention, variants: bool = True) -> Tile:
    """Tile of the table for the op's arguments: of the variant in use, or of the plain kernel."""
    device, half, dim = chip(a.q.device), a.q.dtype != torch.float32, a.q.shape[3]
    variant = variant_in_use(device, half, dim) if variants else None
    tile = choose_tile(device, half, dim, a.block_q, a.block_kv, variant=variant)
    if variant not in (None, tile.kernel):
        sizes = f"{a.q.dtype}, head_dim {dim} and blocks of {a.block_q} x {a.block_kv}"
        instead("forward", variant, f"it has no tile for {name_of(device)}, {sizes}")
    return tile


def _programs(a: Attention, tile: Tile) -> Any:
    """Programs of a launch without splits: one for each tile of queries."""
    return a.kv_counts.shape[2] * (a.block_q // tile.block_m) * a.q.shape[0] * a.q.shape[1]


def _splits(a: Attention, tile: Tile, splits: int | None) -> int:
    if splits is not None:
        return splits
    return choose_splits(_programs(a, tile), a.kv_indices.shape[3], multiprocessors(a.q.device))


def _check_places(places: torch.Tensor, a: Attention) -> None:
    if a.q.shape[2] != a.k.shape[2]:
        raise PlanError(f"places needs as many keys as queries, got {a.k.shape[2]} and {a.q.shape[2]}.")
    if places.dtype != torch.int32 or places.shape != a.q.shape[2:3] or places.device != a.q.device:
        got = f"{places.dtype} {list(places.shape)} on {places.device}"
        raise PlanError(f"expected places int32 [{a.q.shape[2]}] on {a.q.device}, got {got}.")


def launch_forward(
    a: Attention,
    means: Means | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as of the op, whose arguments are already checked.

    `means`: of `means_of`, None for no compensation; `a.compensate` is not read. `tile`: that of the table's plain
    kernel if None. `splits` overrides the rule of `choose_splits`. A variant runs only where its tensors can be
    described, and one of Gluon where rows are not split: else the plain kernel does, with its own tile.
    `places`: int32 [S], a permutation whose values are not checked: the row of q, k, v, kv_mask, out and lse of each
    place of the plan (`BlockPlan.order`), whose blocks `means` are of; the plain kernel gathers.
    Raises PlanError if the device is too old, or the plan's blocks are not multiples of 16 up to 256.
    """
    if places is not None:
        _check_places(places, a)
        places = places.contiguous()
    (batch, heads, q_len, dim), kv_len = a.q.shape, a.k.shape[2]
    plain = forward_tile(a, variants=False)
    tile = plain if tile is None or (places is not None and tile.kernel != "triton") else tile
    if tile.kernel in CONSUMERS:
        done = launch_gluon(a, means, tile) if _splits(a, tile, splits) == 1 else "rows are shared by several programs"
        if not isinstance(done, str):
            return done
        instead("forward", tile.kernel, done)
        tile = plain
    q, k, v, indices = (unit_last_stride(x) for x in (a.q, a.k, a.v, a.kv_indices))
    splits = _splits(a, tile, splits)
    out = v.new_empty((batch, heads, q_len, dim))
    lse = v.new_empty((batch, heads, q_len), dtype=torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts = v.new_empty((splits, *out.shape), dtype=torch.float32)
        part_lse = v.new_empty((splits, *lse.shape), dtype=torch.float32)
    mask = a.kv_counts if a.kv_mask is None else unit_last_stride(a.kv_mask)
    order = heavy_first(a.kv_counts)

    scales, mean = (part_lse,) * 3, k
    if a.qk_int8:
        mean = mean_key(k)
        (q, q_scale), (k, k_scale) = quantise_rows(q), quantise_rows(k, mean)
        scales = (q_scale, k_scale, q_scale)
        if means is not None:
            mean_keys, mean_scale = quantise_rows(means.keys, mean)
            means, scales = means._replace(keys=mean_keys), (q_scale, k_scale, mean_scale)

    sizes = sizes_of(v)
    mean_tensors, mean_strides = mean_operands(means, mask)

    def launch(tile: Tile, keys: Any, values: Any) -> None:
        tma = tile.kernel == "tma"
        wrap_triton(_block_sparse_forward, tma)[(_programs(a, tile), splits)](
            *(q, keys, values, *scales, a.kv_counts, indices, a.kv_counts if order is None else order),
            *(a.kv_counts if places is None else places, mask, *mean_tensors, parts, part_lse),
            *(a.factor, heads, heads // k.shape[1], q_len, kv_len, indices.shape[3]),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *row_strides(a.kv_counts), *row_strides(indices)),
            *(0 if a.kv_mask is None else shared_strides(mask, 0)[0], *mean_strides),
            **sizes,
            BLOCK_Q=a.block_q,
            BLOCK_KV=a.block_kv,
            BLOCK_J=min(MEANS_TILE, tile.block_n),
            RAGGED=kv_len % a.block_kv != 0,
            HAS_MASK=a.kv_mask is not None,
            COMPENSATE=means is not None,
            ORDERED=order is not None,
            SPLITS=splits,
            GATHER=places is not None,
            TMA=tma,
            QK8=a.qk_int8,
            **tile_sizes(tile),
        )

    launch_described("forward", tile, plain, tile.block_n, (k, v), launch)
    if splits > 1:
        merge_splits(parts, part_lse, out, lse)
    return out, lse + shift(a.q, mean, a.factor) if a.qk_int8 else lse
