"""The op `dynamicrad::block_sparse_attention`.

    out[i] = sum_j softmax_j(scale * q_i . k_j) v_j        over the keys j of the active blocks of i's block
    lse[i] = log sum_j exp(scale * q_i . k_j)

With `compensate` = c > 0 every other block J with n_J valid keys adds one key to both sums: its mean key with
log(n_J) + log(c) on the score, and its mean value. Then the softmax is not renormalised without the mass of what
was dropped. `means_op` has the sums over those means alone.

Where the tile table or the environment says that a kernel reads through the copy engine, `_described` launches it:
descriptors can't be traced, so compilers see that op and not its kernels.

out [B, H, Sq, D], contiguous, dtype of q; lse fp32 [B, H, Sq]. A query with no key gives out = 0 and lse = -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import attention_cpu, quantise
from .attention_arguments import Attention, check, kept_pairs, mean_pairs, outputs
from .attention_backward_op import autograd_through
from .define import HAS_TRITON, PAIR, define, parameters_of, signed
from .means import means_of

if HAS_TRITON:
    from ._launch import variants_allowed
    from .attention_triton import KERNELS, forward_tile, launch_forward
else:
    KERNELS = ()


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check(a)
    if variants_allowed() and forward_tile(a).kernel != "triton":
        return _described(*arguments)
    return launch_forward(a, None if a.compensate is None else means_of(a))


def _with_variants(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    return launch_forward(a, None if a.compensate is None else means_of(a), forward_tile(a))


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check(a)
    if not a.qk_int8:
        return attention_cpu.forward(a)
    q, k, lacking = quantise.rounded(a.q, a.k, a.factor)
    out, lse = attention_cpu.forward(a._replace(q=q, k=k))
    return out, lse + lacking


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check(a)
    return outputs(a)


define(
    "block_sparse_attention",
    parameters_of(Attention),
    PAIR,
    cuda=_on_cuda,
    kernels=KERNELS,
    cpu=_on_cpu,
    fake=_fake,
    autograd=autograd_through("block_sparse_attention_backward"),
)
_described = torch.library.custom_op(
    "dynamicrad::block_sparse_attention_described",
    signed(_with_variants, parameters_of(Attention), PAIR),
    mutates_args=(),
    device_types="cuda",
)
_described.register_fake(_fake)


@register_flop_formula(
    [
        torch.ops.dynamicrad.block_sparse_attention,
        torch.ops.dynamicrad.block_sparse_attention_cpu,
        torch.ops.dynamicrad.block_sparse_attention_described,
    ],
    get_raw=True,
)
def flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    """FLOPs of the two matrix products: 4 * head_dim for each pair of a query with a key or a mean."""
    a = Attention(*arguments, **named)
    return 4 * a.q.shape[3] * (kept_pairs(a) + mean_pairs(a))
