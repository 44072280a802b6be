"""The ops `dynamicrad::search_blocks` and `dynamicrad::search_blocks_`: the blocks that hold most of the attention.

AdaSpa's online search (Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation",
2025), decided on the device. Scores are exact, of every pair of blocks (A of `block_mass`, from an lse that may be
that of an earlier denoising step):

    rank "mass"     A[I, J]
    rank "error"    A[I, J] - n_J sum over queries i of I of exp(scale * q_i . mean(k_J) - lse_i)

The second one is the mass that the mean of J's n_J valid keys would lack in its place, never negative (Jensen): what
is lost where means stand for dropped blocks.

A head keeps the round((1 - sparsity) * Mq * Mk) best blocks of all its pairs, not so many of each row; the earlier of
equals, rows one after the other. Always kept, and counted, are those of `kv_counts` and `kv_indices` (in a dense row
all) and the best block of each row. With a recall_threshold below 1 sparsity is moved between heads, its mean s kept:

    recall[b, h] = sum of A over the kept blocks / sum of A
    n = min(heads with a recall above the threshold at s, H // 2) of each sample
    the n heads of best recall get (1 + s) / 2, the n of worst (3 s - 1) / 2; 2 s and 0 where the latter is negative

Of equal recalls that of the lower head counts as better. `search_blocks` returns (counts, indices, recall) of what is
kept, ids ascending in a row and zeros behind them; `search_blocks_` writes them over a state where `refresh` is True
and does nothing where it is False. Nothing waits for the device, and shapes do not depend on values.

Cost for 32,768 tokens, blocks of 128, 40 heads, bf16 (`cost`), against dense attention:

    rank    head_dim   FLOPs     share of dense
    mass    128        11.0 T    50 %
    error   128        11.1 T    50.4 %
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import mass_op, search_cpu
from .blocks import cdiv
from .cost import Cost
from .define import HAS_TRITON, define, parameters_of
from .search_arguments import (
    Search,
    SearchState,
    check,
    check_search_state,
    with_search_state,
    without_search_state,
)

if HAS_TRITON:
    from .search_triton import KERNELS, launch_search
else:
    KERNELS = ()


def outputs(s: Search) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (counts, indices, recall)."""
    _, _, n_q, n_kv = s.mass.shape
    shape = (*s.q.shape[:2], n_q)
    return (
        s.kv_counts.new_empty(shape),
        s.kv_counts.new_empty((*shape, n_kv)),
        s.q.new_empty(shape[:2], dtype=torch.float32),
    )


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    s = Search(*arguments)
    check(s)
    out = outputs(s)
    launch_search(s, *out)
    return out


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    s = Search(*arguments)
    check(s)
    out = outputs(s)
    search_cpu.choose(s, *search_cpu.scores(s), *out)
    return out


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    s = Search(*arguments)
    check(s)
    return outputs(s)


def _checked(arguments: tuple[Any, ...]) -> tuple[Search, SearchState]:
    s, state = without_search_state(arguments)
    check(s)
    check_search_state(s, state)
    return s, state


def _refresh_on_cuda(*arguments: Any) -> None:
    s, state = _checked(arguments)
    launch_search(s, *state)


def _refresh_on_cpu(*arguments: Any) -> None:
    s, state = _checked(arguments)
    if bool(state.refresh):
        search_cpu.choose(s, *search_cpu.scores(s), *state[:3])


def _refresh_fake(*arguments: Any) -> None:
    _checked(arguments)


_PARAMETERS = tuple(parameters_of(Search))
define(
    "search_blocks",
    _PARAMETERS,
    tuple[Tensor, Tensor, Tensor],
    cuda=_on_cuda,
    kernels=KERNELS,
    cpu=_on_cpu,
    fake=_fake,
)
define(
    "search_blocks_",
    with_search_state(_PARAMETERS, tuple(parameters_of(SearchState))),
    None,
    cuda=_refresh_on_cuda,
    kernels=KERNELS,
    cpu=_refresh_on_cpu,
    fake=_refresh_fake,
    mutates=("state_counts", "state_indices", "state_recall"),
)


def cost(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    block_q: int,
    block_kv: int,
    itemsize: int = 2,
    rank: str = "mass",
    adaptive: bool = True,
) -> Cost:
    """Cost of `search_blocks`; `itemsize` is that of q and k in bytes; adaptive: with a recall_threshold below 1.

    FLOPs: those of `block_mass`; by error also those of the mean keys, and an addition per element of k; for each pair
    of blocks 2 in each of 31 halvings, once, or twice where heads differ. Bytes: those of `block_mass`, the scores
    written and read by the kernels that follow (the halvings find them in the cache), and the choice written.
    """
    n_q, n_kv = cdiv(q_len, block_q), cdiv(kv_len, block_kv)
    pairs = n_q * n_kv
    mass = mass_op.cost(batch, heads, kv_heads, q_len, kv_len, head_dim, pairs, itemsize)
    flops = mass.flops + batch * heads * pairs * 2 * 31 * (2 if adaptive else 1)
    moved = mass.bytes + batch * heads * pairs * 4 * 6
    if rank == "error":
        means = mass_op.cost(batch, heads, kv_heads, q_len, n_kv, head_dim, pairs, itemsize)
        flops += means.flops + batch * kv_heads * kv_len * head_dim
        moved += means.bytes + batch * kv_heads * kv_len * head_dim * itemsize
    return Cost(flops, moved)


@register_flop_formula([torch.ops.dynamicrad.search_blocks, torch.ops.dynamicrad.search_blocks_cpu])
def flops(*shapes: Any, out_shape: Any = None, **more: Any) -> int:
    """FLOPs of the arguments' shapes by `cost`. Reads no value."""
    s: Any = Search(*shapes, **more)
    (batch, heads, q_len, dim), (_, kv_heads, kv_len, _) = s.q, s.k
    sizes = (batch, heads, kv_heads, q_len, kv_len, dim, s.block_q, s.block_kv)
    return cost(*sizes, rank=s.rank, adaptive=s.recall_threshold < 1).flops


@register_flop_formula([torch.ops.dynamicrad.search_blocks_, torch.ops.dynamicrad.search_blocks_cpu_])
def flops_of_refresh(*shapes: Any, out_shape: Any = None, **more: Any) -> int:
    """FLOPs of a state that is refreshed, as `flops` counts them."""
    given = dict(zip(with_search_state(Search._fields, SearchState._fields), shapes, strict=False)) | more
    return flops(**{name: given[name] for name in Search._fields if name in given})
