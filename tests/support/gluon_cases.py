"""Cases of block-sparse attention run by the Gluon kernels in `gluon_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynamicrad_compile.kernels.attention_arguments import Attention
from dynamicrad_compile.kernels.attention_gluon import arguments
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


def forward(
    a: Attention, tile: Tile, choose: Callable[[int], int], kernel: Any = None
) -> tuple[Tensor, Tensor, list[list[list[Operation]]]]:
    """(out, lse, traces) of the kernel of a tile, or of one that takes its place."""
    from dynamicrad_compile.kernels.attention_gluon_kernels import _block_sparse_forward_gluon

    out = torch.full(a.q.shape, float("nan"), dtype=a.q.dtype)
    lse = torch.full(a.q.shape[:3], float("nan"))
    means = None if a.compensate is None else means_of(a)
    describe = lambda x, rows, columns: Descriptor(x, (1, 1, rows, columns))  # noqa: E731
    found = arguments(a, means, tile, (out, lse), order_of(a.kv_counts), describe)
    assert found is not None
    programs, given = found
    return out, lse, run(kernel or _block_sparse_forward_gluon, programs, choose, given)


def of_case(case: Case) -> Attention:
    """The op's arguments of a case."""
    return Attention(*build(case))


def tile_of(case: Case, kernel: str, stages: int = 2) -> Tile:
    """Tiles that a case's blocks consist of: no layout, so that they may be small."""
    rows, keys = case.block_q & -case.block_q, case.block_kv & -case.block_kv
    return Tile(min(32, rows), min(32, keys), 8, stages, kernel)
