"""The ops `dynamicrad::select_blocks` and `dynamicrad::select_blocks_`: which candidate blocks a row reads.

    s_IJ = scale * mean(q_I) . mean(k_J) + log(n_J)        n_J = valid keys of block J
    p_IJ = softmax of s_I over the row's N candidates

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

    head_dim   FLOPs    share of dense   bytes     time at full bandwidth   share of dense
    64         0.52 G   0.005 %          352 MB    0.07 ms                  0.40 %
    128        1.03 G   0.005 %          692 MB    0.14 ms                  0.39 %

Reading q and k once is nearly all of it. The outputs are integers and have no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import select_cpu
from .blocks import cdiv, valid_counts
from .define import HAS_TRITON, PAIR, define, parameters_of
from .pool_op import pool_blocks
from .select_arguments import Selection, State, check, check_state

if HAS_TRITON:
    from .pool_triton import KERNELS as POOLING
    from .pool_triton import launch_pooling
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
    q_mean = launch_pooling(s.q, n_queries, s.block_q, None, refresh)
    k_mean = launch_pooling(s.k, n_keys, s.block_kv, s.kv_mask, refresh)
    launch_select(s, q_mean, k_mean, n_keys, out_counts, out_indices, refresh)


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
    out = _outputs(s)
    select_cpu.select(s, q_mean, k_mean, n_keys, *out)
    return out


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    s = Selection(*arguments)
    check(s)
    return _outputs(s)


def _checked(arguments: tuple[Any, ...]) -> tuple[Selection, State]:
    s, state = Selection(*arguments[:11], *arguments[14:]), State(*arguments[11:14])
    check(s)
    check_state(s, state)
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


_PARAMETERS = parameters_of(Selection)
define("select_blocks", _PARAMETERS, PAIR, cuda=_on_cuda, kernels=KERNELS, cpu=_on_cpu, fake=_fake)
define(
    "select_blocks_",
    [*_PARAMETERS[:-1], *parameters_of(State), _PARAMETERS[-1]],
    None,
    cuda=_refresh_on_cuda,
    kernels=KERNELS,
    cpu=_refresh_on_cpu,
    fake=_refresh_fake,
    mutates=("state_counts", "state_indices"),
)


@dataclass(frozen=True)
class Cost:
    """Work of one selection on a GPU: FLOPs, and bytes to and from its memory."""

    flops: int
    bytes: int


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
) -> Cost:
    """Cost of `select_blocks` with rows of `width` candidates; `itemsize` is that of q and k in bytes.

    FLOPs: one addition per element of q and k for the means, 2 * head_dim per candidate for its score, 8 for its
    share and its comparison, and for "mass" and "ratio" 4 in each of 31 halvings. Bytes: q and k, their means
    written and read, ids (a plan shared by all heads) read, counts and ids written.
    """
    n_q, n_kv = cdiv(q_len, block_q), cdiv(kv_len, block_kv)
    tokens = batch * (heads * q_len + kv_heads * kv_len)
    means = batch * (heads * n_q + kv_heads * n_kv)
    candidates = batch * heads * n_q * width
    each = 2 * head_dim + 8 + (0 if criterion == "threshold" else 4 * 31)
    plan = 4 * n_q * (width + 3) + 4 * batch * heads * n_q * (width + 1)
    return Cost(tokens * head_dim + candidates * each, (tokens + 2 * means) * head_dim * itemsize + plan)


@register_flop_formula(
    [
        torch.ops.dynamicrad.select_blocks,
        torch.ops.dynamicrad.select_blocks_cpu,
        torch.ops.dynamicrad.select_blocks_,
        torch.ops.dynamicrad.select_blocks_cpu_,
    ]
)
def flops(
    q: Any, k: Any, counts: Any, indices: Any, forced: Any, near: Any, thresholds: Any, *args: Any, **_: Any
) -> int:
    """FLOPs of the arguments' shapes by `cost`: every row is W wide, and a state is refreshed. Reads no value."""
    _, block_q, block_kv, criterion = args[:4]
    return cost(q[0], q[1], k[1], q[2], k[2], q[3], block_q, block_kv, indices[3], criterion).flops
