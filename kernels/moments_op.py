"""The op `dynamicrad::second_order_attention`: compensation to second order, by the moments of the dropped blocks.

A mean key and a mean value leave out how keys and values of a block vary. With dk and dv the deviations of its n keys
and values from their means, and E over the block, to second order in scale * q . dk,

    sum exp(scale q . k)   = n exp(scale q . mean k) (1 + u),     u = scale^2 / 2 sum_d q_d^2 E[dk_d^2]
    sum exp(scale q . k) v = (the same) (mean v + t),             t = scale q E[dk dv'] / (1 + u)

where u takes the covariance of keys for diagonal: the rest of it changed nothing that could be measured, at twice the
cost. Where attention is diffuse, as it is on noise, t is what a head says about the query at hand, and means alone
drown it. A query block I uses one pair of moments: those of its dropped blocks, weighted by the attention that its mean
query pays to their mean keys,

    R_I = sum_J w_IJ E_J[dk^2]        A_I = sum_J w_IJ E_J[dk dv']        w_IJ = softmax_J(scale q_I . k_J + log n_J)

So a query needs one product with a D x D matrix instead of one for each dropped block, and

    D / Sk + D / (2 block_q block_kv)        of the products of dense attention (`plans.cost`)

are added: 0.8 % at 32k tokens, head_dim 128 and blocks of 128. Arguments and results as of `block_sparse_attention`,
with `compensate`. A row that drops nothing, and a sample of weight 0, computes none of it. Measured in docs/quality.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import attention_cpu, attention_op, moments_backward, quantise
from . import means_op as _registers_means_attention  # noqa: F401
from .attention_arguments import Attention, Results, check_means, mean_pairs, outputs
from .attention_backward_op import PARAMETERS, TRIPLE, autograd_through, check_results, empty_gradients, split
from .attention_backward_op import flops as attention_backward_flops
from .define import HAS_TRITON, PAIR, define, parameters_of
from .derivatives import no_second

if HAS_TRITON:
    from .attention_backward_triton import KERNELS as BACKWARD
    from .moments_triton import KERNELS as FORWARD
    from .moments_triton import launch_second_order
else:
    FORWARD = BACKWARD = ()


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check_means(a)
    return launch_second_order(a)


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check_means(a)
    if not a.qk_int8:
        return attention_cpu.forward(a, covariance=True)
    q, k, lacking = quantise.rounded(a.q, a.k, a.factor)
    out, lse = attention_cpu.forward(a._replace(q=q, k=k), covariance=True)
    return out, lse + lacking


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check_means(a)
    return outputs(a)


def _checked(arguments: tuple[Any, ...]) -> tuple[Attention, Results]:
    a, results = split(arguments)
    check_means(a)
    check_results(a.q, results)
    return a, results


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return moments_backward.backward(*_checked(arguments))


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(_checked(arguments)[0])


define(
    "second_order_attention_backward",
    PARAMETERS,
    TRIPLE,
    cuda=_backward,
    kernels=(*FORWARD, *BACKWARD),
    cpu=_backward,
    fake=_backward_fake,
    autograd=no_second("second_order_attention"),
)
define(
    "second_order_attention",
    parameters_of(Attention),
    PAIR,
    cuda=_on_cuda,
    kernels=FORWARD,
    cpu=_on_cpu,
    fake=_fake,
    autograd=autograd_through("second_order_attention_backward"),
)


def _moment_flops(a: Attention) -> int:
    """Of the three products: covariances of key blocks, their weighting, and the application to queries."""
    (batch, heads, q_len, dim), kv_heads, rows = a.q.shape, a.k.shape[1], a.kv_counts.shape[2]
    if not mean_pairs(a):
        return 0
    return 2 * batch * dim * dim * (kv_heads * a.k.shape[2] + heads * rows * a.num_kv_blocks + heads * q_len)


@register_flop_formula(
    [torch.ops.dynamicrad.second_order_attention, torch.ops.dynamicrad.second_order_attention_cpu], get_raw=True
)
def flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    """FLOPs of the matrix products: those of compensated attention, and those of moments unless nothing is dropped."""
    return attention_op.flops(*arguments, **named) + _moment_flops(Attention(*arguments, **named))


@register_flop_formula(
    [
        torch.ops.dynamicrad.second_order_attention_backward,
        torch.ops.dynamicrad.second_order_attention_backward_cpu,
    ],
    get_raw=True,
)
def backward_flops(*arguments: Any, out_val: Any = None) -> int:
    """FLOPs of the matrix products: those of attention's backward, and two for each product of moments."""
    return attention_backward_flops(*arguments) + 2 * _moment_flops(split(arguments)[0])
