"""The op `dynamicrad::block_sparse_attention_backward`, and how the forward ops get their gradients.

P is computed again from q, k and lse, so the forward saves its arguments and results and nothing else. Two runs give
the same bits.

Where the tile table or the environment says that a kernel reads through the copy engine, `_described` launches it:
descriptors can't be traced, so compilers see that op and not its kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamicrad_compile.errors import PlanError

from . import attention_backward_cpu
from .attention_arguments import Attention, Results, check, kept_pairs, mean_pairs
from .checks import require
from .define import HAS_TRITON, define, parameters_of, signed
from .derivatives import Autograd, no_second
from .means import means_of

if HAS_TRITON:
    from ._launch import variants_allowed
    from .attention_backward_triton import KERNELS, backward_tiles, launch_backward
else:
    KERNELS = ()


TRIPLE = tuple[Tensor, Tensor, Tensor]
PARAMETERS = [*parameters_of(Attention)[:3], *parameters_of(Results), *parameters_of(Attention)[3:]]
"""q, k, v, then `Results`, then the other fields of `Attention`."""


def split(arguments: tuple[Any, ...]) -> tuple[Attention, Results]:
    """The two parts of the arguments of a backward op."""
    return Attention(*arguments[:3], *arguments[7:]), Results(*arguments[3:7])


def check_results(q: Tensor, results: Results) -> None:
    """Raise PlanError unless the results fit the queries."""
    for name, x in results._asdict().items():
        shape = q.shape if name.endswith("out") else q.shape[:3]
        dtype = q.dtype if name.endswith("out") else torch.float32
        if x.dim() != len(shape) or x.dtype != dtype or x.device != q.device:
            raise PlanError(
                f"expected {name} {dtype} {list(shape)} on {q.device}, got {x.dtype} {list(x.shape)} on {x.device}."
            )
        require(x.shape == shape, f"expected {name} {list(shape)} for q {list(q.shape)}, got {list(x.shape)}.")


def empty_gradients(a: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dq, dk, dv, contiguous."""
    return a.q.new_empty(a.q.shape), a.k.new_empty(a.k.shape), a.v.new_empty(a.v.shape)


def _checked(arguments: tuple[Any, ...]) -> tuple[Attention, Results]:
    a, results = split(arguments)
    check(a)
    check_results(a.q, results)
    return a, results


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, results = _checked(arguments)
    if variants_allowed() and any(tile.kernel != "triton" for tile in backward_tiles(a)):
        return _described(*arguments)
    return launch_backward(a, results, None if a.compensate is None else means_of(a))


def _with_variants(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, results = split(arguments)
    return launch_backward(a, results, None if a.compensate is None else means_of(a), backward_tiles(a))


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward_cpu.backward(*_checked(arguments))


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(_checked(arguments)[0])


define(
    "block_sparse_attention_backward",
    PARAMETERS,
    TRIPLE,
    cuda=_on_cuda,
    kernels=KERNELS,
    cpu=_on_cpu,
    fake=_fake,
    autograd=no_second("block_sparse_attention"),
)
_described = torch.library.custom_op(
    "dynamicrad::block_sparse_attention_backward_described",
    signed(_with_variants, PARAMETERS, TRIPLE),
    mutates_args=(),
    device_types="cuda",
)
_described.register_fake(_fake)


def autograd_through(backward_op: str) -> Autograd:
    """The gradients of q, k and v of an op of `Attention` through `dynamicrad::BACKWARD_OP`."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a = Attention(*inputs)
        ctx.save_for_backward(a.q, a.k, a.v, *output, a.kv_counts, a.kv_indices, a.kv_mask, a.compensate)
        ctx.numbers = (a.scale, a.block_q, a.block_kv)

    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, kv_counts, kv_indices, kv_mask, compensate = ctx.saved_tensors
        grads = getattr(torch.ops.dynamicrad, backward_op)(
            *(q, k, v, out, lse, grad_out, grad_lse, kv_counts, kv_indices, *ctx.numbers, kv_mask, compensate)
        )
        return (*grads, *[None] * (len(Attention._fields) - 3))

    return Autograd(backward, setup)


@register_flop_formula(
    [
        torch.ops.dynamicrad.block_sparse_attention_backward,
        torch.ops.dynamicrad.block_sparse_attention_backward_cpu,
        torch.ops.dynamicrad.block_sparse_attention_backward_described,
    ],
    get_raw=True,
)
def flops(*arguments: Any, out_val: Any = None) -> int:
    """FLOPs of the five matrix products, 2.5 times those of the forward.

    Computing P and dS a second time, as the CUDA kernels do, does not count: it is not a part of the problem.
    """
    a, _ = split(arguments)
    return 10 * a.q.shape[3] * (kept_pairs(a) + mean_pairs(a))
