"""Cases of block-sparse attention run by the Gluon kernels in `gluon_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynamicrad_compile.kernels.attention_arguments import Attention, Means
from dynamicrad_compile.kernels.attention_gluon import arguments, unit_last_strides
from dynamicrad_compile.kernels.means import means_of
from dynamicrad_compile.kernels.tiles import Tile

from .attention_cases import Case, build
from .gluon_language import run
from .gluon_model import Descriptor, Operation


def order_of(counts: Tensor) -> Tensor | None:
    """What `heavy_first` says of counts [P, H', Mq]."""
    first = counts[0, 0].tolist()
    if len(first) == 1:
        return None
    heavy = [i for i, n in enumerate(first) if n * len(first) > 2 * sum(first)]
    return torch.tensor([len(heavy), *heavy, *(i for i in range(len(first)) if i not in heavy)], dtype=torch.int32)


def work_of(a: Attention, means: Means | None, tile: Tile) -> Tensor:
    """What `list_work` says, looked up item by item."""
    (batch, heads, _, _), (kv_heads, kv_len) = a.q.shape, a.k.shape[1:3]
    n_rows, of_row, tiles = a.kv_counts.shape[2], a.block_q // tile.block_m, a.block_kv // tile.block_n
    order = order_of(a.kv_counts)
    listed, n_heavy = (range(n_rows), 0) if order is None else (order[1:].tolist(), int(order[0]))
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    places = [(b, h, m) for m in range(n_heavy * of_row) for b, h in pairs]
    places += [(b, h, m) for b, h in pairs for m in range(n_heavy * of_row, n_rows * of_row)]
    items = []
    for b, h, m in places:
        row = listed[m // of_row]
        p, head = min(b, a.kv_counts.shape[0] - 1), min(h, a.kv_counts.shape[1] - 1)
        count, width = int(a.kv_counts[p, head, row]), a.kv_indices.shape[3]
        dense = count >= a.num_kv_blocks
        count = a.num_kv_blocks if dense else min(max(count, 0), width)
        ids = list(range(count)) if dense else a.kv_indices[p, head, row, :count].tolist()
        partial = kv_len // a.block_kv
        full = count if kv_len % a.block_kv == 0 else next((i for i, x in enumerate(ids) if x >= partial), count)
        full = 0 if a.kv_mask is not None else full
        n_means, kept, valid, weight, mask = 0, 0, 0, 0, 0
        if means is not None:
            weight = b if means.weight.shape[0] > 1 else 0
            if not dense and count < a.num_kv_blocks and means.weight[weight] > 0:
                n_means = -(-a.num_kv_blocks // tile.block_n)
            kept = offset(means.bits, p, head, row)
            valid = b * means.counts.stride(0) if means.counts.shape[0] > 1 else 0
        if a.kv_mask is not None and a.kv_mask.shape[0] > 1:
            mask = b * a.kv_mask.stride(0)
        first = row * a.block_q + m % of_row * tile.block_m
        where = (offset(a.kv_indices, p, head, row), kept, mask, valid, weight)
        items.append((b, h, h // (heads // kv_heads), first, n_means, full * tiles, count * tiles,
                      0 if dense else count, *where, 0, 0, 0))  # fmt: skip
    return torch.tensor(items, dtype=torch.int32)


def offset(x: Tensor, p: int, head: int, row: int) -> int:
    """Where a row of a plan's table begins in its memory."""
    return sum(i * x.stride(d) for d, i in enumerate((p, head, row)) if x.shape[d] > 1)


def forward(
    a: Attention, tile: Tile, choose: Callable[[int], int], kernel: Any = None, programs: int = 3
) -> tuple[Tensor, Tensor, list[list[list[Operation]]]]:
    """(out, lse, traces) of the kernel of a tile, or of one that takes its place, by so many programs."""
    from dynamicrad_compile.kernels.attention_gluon_kernels import _block_sparse_forward_gluon

    out = torch.full(a.q.shape, float("nan"), dtype=a.q.dtype)
    lse = torch.full(a.q.shape[:3], float("nan"))
    means = None if a.compensate is None else means_of(a)
    describe = lambda x, rows, columns: Descriptor(x, (1, 1, rows, columns))  # noqa: E731
    a = unit_last_strides(a)
    work = work_of(a, means, tile)
    given = arguments(a, means, tile, (out, lse), work, describe)
    assert given is not None
    return out, lse, run(kernel or _block_sparse_forward_gluon, min(programs, work.shape[0]), choose, given)


def of_case(case: Case) -> Attention:
    """The op's arguments of a case."""
    return Attention(*build(case))


def tile_of(case: Case, kernel: str, stages: int = 2) -> Tile:
    """Tiles that a case's blocks consist of: no layout, so that they may be small."""
    rows, keys = case.block_q & -case.block_q, case.block_kv & -case.block_kv
    return Tile(min(32, rows), min(32, keys), 8, stages, kernel)
