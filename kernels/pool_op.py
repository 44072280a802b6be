"""The op `dynamicrad::pool_blocks`: the mean over the valid tokens of each block of a sequence.

    mean[J] = sum_j x[j] / count[J]        over the valid tokens j of block J; 0 where there is none

CUDA runs the kernel of `pool_triton`, CPU plain PyTorch. The op is linear in x and has its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamicrad_compile.errors import PlanError

from .blocks import cdiv, valid_counts
from .checks import DTYPES, require
from .define import HAS_TRITON, PAIR, define, parameters_of
from .derivatives import Autograd
from .pool_cpu import block_means

if HAS_TRITON:
    from .pool_triton import KERNELS, launch_pooling
else:
    KERNELS = ()


class Pooling(NamedTuple):
    """Arguments of the op."""

    x: Tensor  # [B, H, S, D], any strides
    block: int
    kv_mask: Tensor | None = None  # bool [B or 1, S], True where a token is valid


def _check(p: Pooling) -> None:
    if p.x.dim() != 4 or p.x.dtype not in DTYPES:
        raise PlanError(f"expected x [B, H, S, D] in float16, bfloat16 or float32, got {p.x.dtype} {list(p.x.shape)}.")
    if p.block < 1:
        raise PlanError(f"block must be at least 1, got {p.block}.")
    if p.kv_mask is None:
        return
    got = f"got {p.kv_mask.dtype} {list(p.kv_mask.shape)} for x {list(p.x.shape)}."
    if p.kv_mask.dtype != torch.bool or p.kv_mask.dim() != 2:
        raise PlanError(f"expected kv_mask bool [B or 1, S], {got}")
    fits = p.kv_mask.shape[1] == p.x.shape[2] and (p.kv_mask.shape[0] == 1 or p.kv_mask.shape[0] == p.x.shape[0])
    require(fits, f"kv_mask must have x's length and a batch of 1 or x's, {got}")
    if p.kv_mask.device != p.x.device:
        raise PlanError(f"kv_mask is on {p.kv_mask.device}, x on {p.x.device}. Move it there.")


def _on_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(p := Pooling(*arguments))
    mean, count = block_means(p.x, p.block, p.kv_mask)
    return mean.to(p.x.dtype).contiguous(), count


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(p := Pooling(*arguments))
    count = valid_counts(p.x.shape[2], p.block, p.kv_mask, p.x.device)
    return launch_pooling(p.x, count, p.block, p.kv_mask), count


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(p := Pooling(*arguments))
    batch, heads, length, dim = p.x.shape
    n_blocks = cdiv(length, p.block)
    count = p.x.new_empty((1 if p.kv_mask is None else p.kv_mask.shape[0], n_blocks), dtype=torch.int32)
    return p.x.new_empty((batch, heads, n_blocks, dim)), count


def spread(grad_mean: Tensor, count: Tensor, block: int, length: int, kv_mask: Tensor | None) -> Tensor:
    """The gradient of x [B, H, length, D] from that of the means [B, H, M, D]; count int32 [B or 1, M]."""
    share = grad_mean / count.clamp(min=1).unsqueeze(1).unsqueeze(-1).to(grad_mean.dtype)
    grad = share.unsqueeze(3).expand(-1, -1, -1, block, -1).flatten(2, 3).narrow(2, 0, length)
    return grad if kv_mask is None else torch.where(kv_mask.unsqueeze(1).unsqueeze(-1), grad, 0.0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.block, kv_mask = inputs
    ctx.length = x.shape[2]
    ctx.save_for_backward(output[1], kv_mask)


def _gradients(ctx: Any, grad_mean: Tensor, grad_count: Any) -> tuple[Tensor, None, None]:
    count, kv_mask = ctx.saved_tensors
    return spread(grad_mean, count, ctx.block, ctx.length, kv_mask), None, None


define(
    "pool_blocks",
    parameters_of(Pooling),
    PAIR,
    cuda=_on_cuda,
    kernels=KERNELS,
    cpu=_on_cpu,
    fake=_fake,
    autograd=Autograd(_gradients, _save),
)


@register_flop_formula([torch.ops.dynamicrad.pool_blocks, torch.ops.dynamicrad.pool_blocks_cpu])
def flops(x_shape: Any, *args: Any, **kwargs: Any) -> int:
    """One addition per element of x."""
    batch, heads, length, dim = x_shape
    return batch * heads * length * dim


def pool_blocks(x: Tensor, block: int, kv_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of each block of `block` tokens, and how many tokens of it are valid.

    x [B, H, S, D], fp16, bf16 or fp32, any strides. kv_mask: bool [B or 1, S], True where a token is valid; all
    are if None. The last block may be partial.
    Returns mean [B, H, M, D], contiguous, dtype of x, accumulated in fp32, 0 for a block without a valid token,
    and count int32 [B of kv_mask or 1, M], with M = ceil(S / block).
    Raises PlanError if shapes, dtypes or devices do not fit together.
    """
    return torch.ops.dynamicrad.pool_blocks(x, block, kv_mask)
