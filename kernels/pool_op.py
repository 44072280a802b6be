"""The op `dynamicrad::pool_blocks`: the mean over the valid tokens of each block of a sequence.

    mean[J] = sum_j x[j] / count[J]        over the valid tokens j of block J; 0 where there is none

CUDA runs the Triton kernel of `triton_pooling` through a `triton_op`, CPU plain PyTorch. The op is linear in x
and has its gradient. Nothing here synchronises a CUDA device with the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamicrad_compile.errors import PlanError

from .blocks import cdiv
from .define import define

try:
    from .pool_triton import KERNELS, launch_pooling
except ImportError:  # no Triton here: CPU tensors only
    KERNELS, launch_pooling = None, None  # type: ignore[assignment]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _validate(x: Tensor, block: int, kv_mask: Tensor | None) -> None:
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise PlanError(f"expected x [B, H, S, D] in float16, bfloat16 or float32, got {x.dtype} {list(x.shape)}.")
    if block < 1:
        raise PlanError(f"block must be at least 1, got {block}.")
    if kv_mask is None:
        return
    got = f"got {kv_mask.dtype} {list(kv_mask.shape)} for x {list(x.shape)}."
    if kv_mask.dtype != torch.bool or kv_mask.dim() != 2:
        raise PlanError(f"expected kv_mask bool [B or 1, S], {got}")
    fits = kv_mask.shape[1] == x.shape[2] and (kv_mask.shape[0] == 1 or kv_mask.shape[0] == x.shape[0])
    if not isinstance(fits, torch.SymBool) and not fits:
        raise PlanError(f"kv_mask must have x's length and a batch of 1 or x's, {got}")
    if kv_mask.device != x.device:
        raise PlanError(f"kv_mask is on {kv_mask.device}, x on {x.device}. Move it there.")


def valid_counts(length: int, block: int, kv_mask: Tensor | None, device: torch.device) -> Tensor:
    """int32 [B or 1, M], valid tokens of each block of a sequence of `length` tokens; plain ATen operations.

    No `x[None]`: while tracing for CUDA that asks for a device, which the tracing machine may lack.
    """
    n_blocks = cdiv(length, block)
    if kv_mask is None:
        before = torch.arange(n_blocks, dtype=torch.int32, device=device) * -block
        return (before + length).clamp(max=block).unsqueeze(0)
    padded = torch.nn.functional.pad(kv_mask, (0, n_blocks * block - length))
    return padded.reshape(kv_mask.shape[0], n_blocks, block).sum(-1, dtype=torch.int32)


def _pool_cpu(x: Tensor, block: int, kv_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _validate(x, block, kv_mask)
    count = valid_counts(x.shape[2], block, kv_mask, x.device)
    if kv_mask is not None:
        x = x.masked_fill(~kv_mask[:, None, :, None], 0)
    whole = x.shape[2] // block * block
    total = x[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=torch.float32) if whole else None
    if whole < x.shape[2]:
        tail = x[:, :, whole:].sum(2, keepdim=True, dtype=torch.float32)
        total = tail if total is None else torch.cat((total, tail), 2)
    assert total is not None
    return (total / count.clamp(min=1)[:, None, :, None]).to(x.dtype).contiguous(), count


def _pool(x: Tensor, block: int, kv_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _validate(x, block, kv_mask)
    if x.device.type != "cuda":
        raise PlanError(f"pool_blocks runs on cpu and cuda tensors, got {x.device}.")
    if launch_pooling is None:
        raise PlanError("pool_blocks needs Triton for CUDA tensors. Install triton.")
    count = valid_counts(x.shape[2], block, kv_mask, x.device)
    return launch_pooling(x, count, block, kv_mask), count


def _fake(x: Tensor, block: int, kv_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _validate(x, block, kv_mask)
    batch, heads, length, dim = x.shape
    n_blocks = cdiv(length, block)
    count = x.new_empty((1 if kv_mask is None else kv_mask.shape[0], n_blocks), dtype=torch.int32)
    return x.new_empty((batch, heads, n_blocks, dim)), count


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.block, kv_mask = inputs
    ctx.length = x.shape[2]
    ctx.save_for_backward(output[1], kv_mask)


def _gradients(ctx: Any, grad_mean: Tensor, grad_count: Any) -> tuple[Tensor, None, None]:
    count, kv_mask = ctx.saved_tensors
    share = grad_mean / count.clamp(min=1)[:, None, :, None].to(grad_mean.dtype)
    grad = share.repeat_interleave(ctx.block, 2)[:, :, : ctx.length]
    return (grad if kv_mask is None else grad.masked_fill(~kv_mask[:, None, :, None], 0)), None, None


_op_cpu = torch.library.custom_op("dynamicrad::pool_blocks_cpu", _pool_cpu, mutates_args=())


def _dispatch(x: Tensor, block: int, kv_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if x.device.type == "cpu":
        return torch.ops.dynamicrad.pool_blocks_cpu(x, block, kv_mask)
    return _pool(x, block, kv_mask)


_op = define("dynamicrad::pool_blocks", _dispatch, KERNELS)
_op.register_kernel("cpu")(_pool_cpu)  # saves eager code the second dispatch
for _definition in (_op, _op_cpu):
    _definition.register_fake(_fake)
    _definition.register_autograd(_gradients, setup_context=_save)


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
