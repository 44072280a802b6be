"""Launcher of the Triton kernels of `dynamicrad::search_blocks`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ._launch import row_strides, shared_strides, unit_last_stride, wrap_triton
from .blocks import valid_counts
from .mass_triton import KERNELS as MASS
from .mass_triton import launch_mass
from .pool_triton import KERNELS as POOLING
from .pool_triton import launch_pooling
from .search_arguments import Search, budget, sparsities
from .search_triton_kernels import _cut_heads, _list_blocks, _rank_blocks, _share_budgets

KERNELS: tuple[Any, ...] = (*POOLING, *MASS, _rank_blocks, _cut_heads, _share_budgets, _list_blocks)
ROW = {"BLOCK_C": 512, "num_warps": 4}
"""Chunks of a row of blocks."""
LISTED = 16
"""Ids of a row at a time that are compared with a chunk."""
HEAD = {"BLOCK_C": 4096, "num_warps": 8}
"""Chunks of all pairs of blocks of a head, which one program walks."""


def launch_scores(s: Search, refresh: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [B, H, Mq, Mk], the mass of each block and of its mean key, and int32 [B' or 1, Mk], its valid keys.

    The latter two are those of rank "error", else anything. Uninitialised where `refresh` is given and False.
    """
    mass = launch_mass(s.mass, refresh)
    n_keys = valid_counts(s.k.shape[2], s.block_kv, s.kv_mask, s.k.device)
    if s.rank == "mass":
        return mass, mass, n_keys
    mean = launch_pooling(s.k, n_keys, s.block_kv, s.kv_mask, refresh, torch.float32)
    return mass, launch_mass(s.mass._replace(k=mean, block_kv=1, kv_mask=None), refresh), n_keys


def launch_choice(
    s: Search,
    scores: tuple[Tensor, Tensor, Tensor],
    out_counts: Tensor,
    out_indices: Tensor,
    out_recall: Tensor,
    refresh: Tensor | None = None,
) -> None:
    """Fill the outputs as `launch_search`, from `launch_scores`."""
    mass, held, n_keys = scores
    batch, heads, n_q, n_kv = s.mass.shape
    indices = unit_last_stride(s.kv_indices)
    keys = s.kv_counts.new_empty((batch, heads, n_q, n_kv))
    limits, places, budgets = (s.kv_counts.new_empty((batch, heads)) for _ in range(3))
    flag, has_refresh = s.kv_counts if refresh is None else refresh, refresh is not None
    wrap_triton(_rank_blocks)[(n_q, batch * heads)](
        *(mass, held, n_keys, s.kv_counts, indices, flag, keys, heads, n_q, n_kv, indices.shape[3]),
        *(*shared_strides(n_keys, 0), *row_strides(s.kv_counts), *row_strides(indices)),
        BLOCK_W=LISTED,
        BY_ERROR=s.rank == "error",
        HAS_REFRESH=has_refresh,
        **ROW,
    )

    def cut(recall: Tensor, shared: bool) -> None:
        wrap_triton(_cut_heads)[(batch * heads,)](
            *(keys, mass, budgets, flag, limits, places, recall, budget(s.sparsity, n_q, n_kv), n_q * n_kv),
            HAS_BUDGETS=not shared,
            HAS_REFRESH=has_refresh,
            **HEAD,
        )

    if s.recall_threshold >= 1:
        cut(out_recall, True)
    else:
        lower, upper = (budget(sparsity, n_q, n_kv) for sparsity in sparsities(s.sparsity))
        recall = s.q.new_empty((batch, heads), dtype=torch.float32)
        cut(recall, True)
        wrap_triton(_share_budgets)[(batch,)](
            *(recall, flag, budgets, s.recall_threshold, budget(s.sparsity, n_q, n_kv), upper, lower, heads),
            BLOCK_H=triton.next_power_of_2(heads),
            HAS_REFRESH=has_refresh,
        )
        cut(out_recall, False)
    wrap_triton(_list_blocks)[(n_q, batch * heads)](
        *(keys, limits, places, flag, out_counts, out_indices, n_q, n_kv), HAS_REFRESH=has_refresh, **ROW
    )


def launch_search(
    s: Search, out_counts: Tensor, out_indices: Tensor, out_recall: Tensor, refresh: Tensor | None = None
) -> None:
    """Fill out_counts int32 [B, H, Mq], out_indices int32 [B, H, Mq, Mk] and out_recall fp32 [B, H], all contiguous.

    Arguments as of the op, already checked. Where `refresh` bool [1] is given and False nothing is written, and every
    kernel ends at once. Raises PlanError if the device is too old, or blocks are not multiples of 16 up to 256.
    """
    launch_choice(s, launch_scores(s, refresh), out_counts, out_indices, out_recall, refresh)
