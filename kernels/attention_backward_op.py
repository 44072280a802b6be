"""The op `dynamicrad::block_sparse_attention_backward` and its place in autograd.

Like the forward, CUDA runs the Triton kernels of `triton_backward` through a `triton_op`, and CPU
`cpu_backward.backward`, which compilers see as the opaque op `dynamicrad::block_sparse_attention_backward_cpu`.
P is computed again from q, k and lse, so the forward saves its arguments and results and nothing else. Nothing
here synchronises a CUDA device with the host, and two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamicrad_compile.errors import PlanError

from . import attention_backward_cpu as cpu_backward
from .define import define
from .means import means_of

try:
    from .attention_backward_triton import KERNELS, launch_backward
except ImportError:  # no Triton here: CPU tensors only
    KERNELS, launch_backward = None, None  # type: ignore[assignment]


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    *arguments: Any,
) -> None:
    """Check what the forward's checks do not know; those then see the `arguments` that both ops share."""
    from .attention_op import _validate as validate_forward  # it imports this module

    validate_forward(q, k, v, *arguments)
    for name, x, shape in (
        ("out", out, q.shape),
        ("grad_out", grad_out, q.shape),
        ("lse", lse, q.shape[:3]),
        ("grad_lse", grad_lse, q.shape[:3]),
    ):
        dtype = q.dtype if len(shape) == 4 else torch.float32
        if x.dim() != len(shape) or x.dtype != dtype or x.device != q.device:
            raise PlanError(
                f"expected {name} {dtype} {list(shape)} on {q.device}, got {x.dtype} {list(x.shape)} on {x.device}."
            )
        same = x.shape == shape
        if not isinstance(same, torch.SymBool) and not same:
            raise PlanError(f"expected {name} {list(shape)} for q {list(q.shape)}, got {list(x.shape)}.")


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None = None,
    mask_start: int = 0,
    compensate: Tensor | None = None,
    dropped_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors, plan = (q, k, v, out, lse, grad_out, grad_lse), (kv_counts, kv_indices)
    if q.device.type == "cpu":
        return torch.ops.dynamicrad.block_sparse_attention_backward_cpu(
            *tensors, *plan, scale, block_q, block_kv, kv_mask, mask_start, compensate, dropped_only
        )
    _validate(*tensors, *plan, scale, block_q, block_kv, kv_mask, mask_start, compensate)
    if q.device.type != "cuda":
        raise PlanError(f"block_sparse_attention_backward runs on cpu and cuda tensors, got {q.device}.")
    if launch_backward is None:
        raise PlanError("block_sparse_attention_backward needs Triton for CUDA tensors. Install triton.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    means = None
    if compensate is not None:
        means = means_of(k, v, kv_counts, kv_indices, block_kv, kv_mask, compensate)
    read = torch.zeros_like(kv_counts) if dropped_only else kv_counts
    return launch_backward(*tensors, read, kv_indices, scale, block_q, block_kv, kv_mask, mask_start, means)


def _backward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None = None,
    mask_start: int = 0,
    compensate: Tensor | None = None,
    dropped_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors, plan = (q, k, v, out, lse, grad_out, grad_lse), (kv_counts, kv_indices)
    _validate(*tensors, *plan, scale, block_q, block_kv, kv_mask, mask_start, compensate)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return cpu_backward.backward(*tensors, *plan, scale, block_q, block_kv, kv_mask, compensate, dropped_only)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None = None,
    mask_start: int = 0,
    compensate: Tensor | None = None,
    dropped_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors, plan = (q, k, v, out, lse, grad_out, grad_lse), (kv_counts, kv_indices)
    _validate(*tensors, *plan, scale, block_q, block_kv, kv_mask, mask_start, compensate)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_op = define("dynamicrad::block_sparse_attention_backward", _backward, KERNELS)
_op_cpu = torch.library.custom_op("dynamicrad::block_sparse_attention_backward_cpu", _backward_cpu, mutates_args=())
_op.register_kernel("cpu")(_backward_cpu)  # saves eager code the second dispatch
for _definition in (_op, _op_cpu):
    _definition.register_fake(_fake)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """setup_context of the attention ops; `inputs` are theirs, defaults included."""
    q, k, v, kv_counts, kv_indices, scale, block_q, block_kv, kv_mask, mask_start, compensate, _, dropped_only = inputs
    ctx.save_for_backward(q, k, v, *output, kv_counts, kv_indices, kv_mask, compensate)
    ctx.numbers = (scale, block_q, block_kv, mask_start, dropped_only)


def gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    """backward of the attention ops: gradients of q, k and v."""
    q, k, v, out, lse, kv_counts, kv_indices, kv_mask, compensate = ctx.saved_tensors
    scale, block_q, block_kv, mask_start, dropped_only = ctx.numbers
    grads = torch.ops.dynamicrad.block_sparse_attention_backward(
        *(q, k, v, out, lse, grad_out, grad_lse, kv_counts, kv_indices),
        *(scale, block_q, block_kv, kv_mask, mask_start, compensate, dropped_only),
    )
    return (*grads, *[None] * 10)


@register_flop_formula(
    [
        torch.ops.dynamicrad.block_sparse_attention_backward,
        torch.ops.dynamicrad.block_sparse_attention_backward_cpu,
    ],
    get_raw=True,
)
def flops(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor, *args: Any, **kw: Any
) -> int:
    """FLOPs of the five matrix products, 2.5 times those of the forward.

    Computing P and dS a second time, as the CUDA kernels do, does not count: it is not a part of the problem.
    """
    from .attention_op import flops as forward_flops  # it imports this module

    return 5 * forward_flops(q, k, v, *args, **kw) // 2
