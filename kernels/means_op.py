"""The op `dynamicrad::means_attention`: attention over the means of the blocks that a row drops, and nothing else.

    out[i] = sum_J softmax_J(scale * q_i . mean(k_J) + log(n_J) + log(c)) mean(v_J)

over the blocks J that i's row does not keep, with n_J valid keys and `compensate` = c. It is what compensation adds
to `block_sparse_attention`, apart: `second_order_attention` corrects it by covariances and merges the two by lse.
Arguments and results as of `block_sparse_attention`. CUDA runs the same kernels, with rows that read no block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import means_attention_cpu, quantise
from .attention_arguments import Attention, Results, check_means, mean_pairs, outputs
from .attention_backward_op import (
    PARAMETERS,
    TRIPLE,
    autograd_through,
    check_results,
    empty_gradients,
    split,
)
from .define import HAS_TRITON, PAIR, define, parameters_of
from .derivatives import no_second
from .means import means_of

if HAS_TRITON:
    from .attention_backward_triton import KERNELS as BACKWARD
    from .attention_backward_triton import launch_backward
    from .attention_triton import KERNELS as FORWARD
    from .attention_triton import launch_forward
else:
    FORWARD = BACKWARD = ()


def _reading_no_block(a: Attention) -> Attention:
    return a._replace(kv_counts=torch.zeros_like(a.kv_counts))


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check_means(a)
    return launch_forward(_reading_no_block(a), means_of(a))


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Attention(*arguments)
    check_means(a)
    if not a.qk_int8:
        return means_attention_cpu.forward(a)
    q, k, lacking = quantise.rounded(a.q, a.k, a.factor)
    out, lse = means_attention_cpu.forward(a._replace(q=q, k=k))
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


def _backward_on_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, results = _checked(arguments)
    return launch_backward(_reading_no_block(a), results, means_of(a))


def _backward_on_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return means_attention_cpu.backward(*_checked(arguments))


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(_checked(arguments)[0])


define(
    "means_attention_backward",
    PARAMETERS,
    TRIPLE,
    cuda=_backward_on_cuda,
    kernels=BACKWARD,
    cpu=_backward_on_cpu,
    fake=_backward_fake,
    autograd=no_second("means_attention"),
)
define(
    "means_attention",
    parameters_of(Attention),
    PAIR,
    cuda=_on_cuda,
    kernels=FORWARD,
    cpu=_on_cpu,
    fake=_fake,
    autograd=autograd_through("means_attention_backward"),
)


@register_flop_formula([torch.ops.dynamicrad.means_attention, torch.ops.dynamicrad.means_attention_cpu], get_raw=True)
def flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    """FLOPs of the two matrix products: 4 * head_dim for each pair of a query with a mean."""
    a = Attention(*arguments, **named)
    return 4 * a.q.shape[3] * mean_pairs(a)


@register_flop_formula(
    [torch.ops.dynamicrad.means_attention_backward, torch.ops.dynamicrad.means_attention_backward_cpu], get_raw=True
)
def backward_flops(*arguments: Any, out_val: Any = None) -> int:
    """FLOPs of the five matrix products, 2.5 times those of the forward."""
    a, _ = split(arguments)
    return 10 * a.q.shape[3] * mean_pairs(a)
