"""The ops `dynamicrad::select_blocks` and `dynamicrad::select_blocks_`: which candidate blocks a row reads.

    s_IJ = scale * mean(q_I) . mean(k_J) + log(n_J)        n_J = valid keys of block J
    p_IJ = softmax of s_I over the row's N candidates

This is rank "mass": p is a candidate's share of the row's attention, as pooled queries and keys tell it. Rank "error"
goes by what would be wrong if the mean of J's keys stood for them, the softmax's expected term of second order
(u of `moments_op`, averaged over the block's queries; it takes the covariance of keys for diagonal):

    s_IJ = scale * mean(q_I) . mean(k_J) + log(n_J) + log(e_IJ)
    e_IJ = scale^2 / 2 * sum_d mean(q_I,d^2) var(k_J,d)      mean over the block's queries, variance over its keys

so that p is a candidate's share of the row's expected error. A block without variance (equal keys, or one) has no
error: it comes after every block with some, whatever its mass, and before those without a valid key. Among several
such the earlier candidate comes first.

Candidates come from a plan whose rows are ordered [forced | near | far]; forced ones are kept. Of the others

    "threshold"   keeps those with log(N * p) >= threshold: 0 is the average share, -inf keeps all
    "mass"        keeps the fewest of a group, best first, that hold threshold x the group's mass: 1 keeps all
    "ratio"       keeps the ceil(threshold * size) best of a group: 1 keeps all, 0 none

with one threshold for the near group and one for the far group. None of them depends on head_dim or on the scale
of a model's keys. Thresholds are read on the device, so that regimes can change without recompiling.

`select_blocks` returns the choice. `select_blocks_` writes it over a state where `refresh` is True and does nothing
where it is False, so that a choice serves several denoising steps.

Cost for 32,768 tokens, blocks of 128, 40 heads, bf16, all 256 blocks of a row candidates (`cost`), against dense
attention at 600 TFLOP/s, with 4.8 TB/s of memory bandwidth (the data sheet of H200):

    rank    head_dim   FLOPs    share of dense   bytes     time at full bandwidth   share of dense
    mass    64         0.52 G   0.005 %          352 MB    0.07 ms                  0.40 %
    mass    128        1.03 G   0.005 %          692 MB    0.14 ms                  0.39 %
    error   64         1.28 G   0.012 %          362 MB    0.08 ms                  0.41 %
    error   128        2.54 G   0.012 %          713 MB    0.15 ms                  0.41 %

Reading q and k once is nearly all of it. The outputs are integers and have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import select_cpu
from .blocks import cdiv, valid_counts
from .cost import Cost
from .define import HAS_TRITON, PAIR, define, parameters_of
from .pool_cpu import second_moments
from .pool_op import pool_blocks
from .select_arguments import Selection, State, check, check_selection_state, with_state, without_state

if HAS_TRITON:
    from .pool_triton import KERNELS as POOLING
    from .pool_triton import launch_moments
    from .select_triton import KERNELS as SELECTION
    from .select_triton import launch_select

    KERNELS: tuple[Any, ...] = (*POOLING, *SELECTION)
else:
    KERNELS = ()


def _outputs(s: Selection) -> tuple[Tensor, Tensor]:
    shape = (*s.q.shape[:2], *s.kv_indices.shape[2:])
    return s.kv_indices.new_empty(shape[:3]), s.kv_indices.new_empty(shape)


def _launch(s: Selection, out_counts: Tensor, out_indices: Tensor, refresh: Tensor | None) -> None:
    """Pool q and k, then choose. Kernels end at once where `refresh` is False."""
    n_queries = valid_counts(s.q.shape[2], s.block_q, None, s.q.device)
    n_keys = valid_counts(s.k.shape[2], s.block_kv, s.kv_mask, s.k.device)
    by_error = s.rank == "error"
    q_mean, square = launch_moments(s.q, n_queries, s.block_q, None, refresh, "square" if by_error else "")
    k_mean, variance = launch_moments(s.k, n_keys, s.block_kv, s.kv_mask, refresh, "variance" if by_error else "")
    seconds = (square, variance) if by_error else None
    launch_select(s, q_mean, k_mean, n_keys, out_counts, out_indices, refresh, seconds)


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    s = Selection(*arguments)
    check(s)
    out = _outputs(s)
    _launch(s, *out, None)
    return out


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    s = Selection(*arguments)
    check(s)
    (q_mean, _), (k_mean, n_keys) = pool_blocks(s.q, s.block_q), pool_blocks(s.k, s.block_kv, s.kv_mask)
    seconds = None
    if s.rank == "error":
        square = second_moments(s.q, s.block_q, None, "square")
        seconds = square, second_moments(s.k, s.block_kv, s.kv_mask, "variance")
    out = _outputs(s)
    select_cpu.select(s, q_mean, k_mean, n_keys, *out, seconds)
    return out


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    s = Selection(*arguments)
    check(s)
    return _outputs(s)


def _checked(arguments: tuple[Any, ...]) -> tuple[Selection, State]:
    s, state = without_state(arguments)
    check(s)
    check_selection_state(s, state)
    return s, state


def _refresh_on_cuda(*arguments: Any) -> None:
    s, state = _checked(arguments)
    _launch(s, *state)


def _refresh_on_cpu(*arguments: Any) -> None:
    s, state = _checked(arguments)
    if bool(state.refresh):
        for kept, chosen in zip(state, _on_cpu(*s), strict=False):
            kept.copy_(chosen)


def _refresh_fake(*arguments: Any) -> None:
    _checked(arguments)


_PARAMETERS = tuple(parameters_of(Selection))
define("select_blocks", _PARAMETERS, PAIR, cuda=_on_cuda, kernels=KERNELS, cpu=_on_cpu, fake=_fake)
define(
    "select_blocks_",
    with_state(_PARAMETERS, tuple(parameters_of(State))),
    None,
    cuda=_refresh_on_cuda,
    kernels=KERNELS,
    cpu=_refresh_on_cpu,
    fake=_refresh_fake,
    mutates=("state_counts", "state_indices"),
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
    width: int,
    criterion: str = "threshold",
    itemsize: int = 2,
    rank: str = "mass",
) -> Cost:
    """Cost of `select_blocks` with rows of `width` candidates; `itemsize` is that of q and k in bytes.

    FLOPs: one addition per element of q and k for the means, 2 * head_dim per candidate for its score, 8 for its
    share and its comparison, and for "mass" and "ratio" 4 in each of 31 halvings. Rank "error" adds 2 per element of
    q, 3 per element of k, and 2 * head_dim per candidate. Bytes: q and k, their means written and read (and as many
    fp32 second moments), ids (a plan shared by all heads) read, counts and ids written.
    """
    by_error = rank == "error"
    n_q, n_kv = cdiv(q_len, block_q), cdiv(kv_len, block_kv)
    tokens = batch * (heads * q_len + kv_heads * kv_len)
    means = batch * (heads * n_q + kv_heads * n_kv)
    candidates = batch * heads * n_q * width
    each = (4 if by_error else 2) * head_dim + 8 + (0 if criterion == "threshold" else 4 * 31)
    pooling = tokens + by_error * batch * (2 * heads * q_len + 3 * kv_heads * kv_len)
    pooled = means * (itemsize + 4 * by_error)
    plan = 4 * n_q * (width + 3) + 4 * batch * heads * n_q * (width + 1)
    return Cost(pooling * head_dim + candidates * each, (tokens * itemsize + 2 * pooled) * head_dim + plan)


@register_flop_formula([torch.ops.dynamicrad.select_blocks, torch.ops.dynamicrad.select_blocks_cpu])
def flops(*shapes: Any, out_shape: Any = None, **more: Any) -> int:
    """FLOPs of the arguments' shapes by `cost`: every row is W wide. Reads no value."""
    s: Any = Selection(*shapes, **more)
    (batch, heads, q_len, dim), (_, kv_heads, kv_len, _) = s.q, s.k
    sizes = (batch, heads, kv_heads, q_len, kv_len, dim, s.block_q, s.block_kv, s.kv_indices[3])
    return cost(*sizes, s.criterion, rank=s.rank).flops


@register_flop_formula([torch.ops.dynamicrad.select_blocks_, torch.ops.dynamicrad.select_blocks_cpu_])
def flops_of_refresh(*shapes: Any, out_shape: Any = None, **more: Any) -> int:
    """FLOPs of a state that is refreshed, as `flops` counts them."""
    given = dict(zip(with_state(Selection._fields, State._fields), shapes, strict=False)) | more
    return flops(**{name: given[name] for name in Selection._fields if name in given})
