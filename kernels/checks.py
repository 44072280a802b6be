"""What the ops check of their arguments: shapes, dtypes and devices, never a value of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamicrad_compile.errors import PlanError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def require(condition: Any, message: str) -> None:
    """Raise PlanError unless `condition`; a symbolic one is left to the call with real tensors."""
    if not isinstance(condition, torch.SymBool) and not condition:
        raise PlanError(message)


def check_operands(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """q [B, H, Sq, D], k and, where there is one, v [B, Hkv, Sk, D] of one supported dtype; Hkv divides H."""
    given = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    names = "q and k" if v is None else "q, k and v"
    shapes = "got " + ", ".join(f"{name} {list(x.shape)}" for name, x in given.items()) + "."
    if any(x.dim() != 4 for x in given.values()):
        both = "k" if v is None else "k and v"
        raise PlanError(f"expected q [B, H, Sq, D] and {both} [B, Hkv, Sk, D], {shapes}")
    if v is not None:
        for d, name in enumerate(("batch", "head count", "length", "head_dim")):
            require(k.shape[d] == v.shape[d], f"k and v must have the same {name}, {shapes}")
    for d, name in ((0, "batch"), (3, "head_dim")):
        require(q.shape[d] == k.shape[d], f"q and k must have the same {name}, {shapes}")
    require(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, f"Hkv must divide H, {shapes}")
    require(1 <= q.shape[3] <= MAX_HEAD_DIM, f"head_dim must be 1 to {MAX_HEAD_DIM}, got {q.shape[3]}.")
    if q.dtype not in DTYPES or any(x.dtype != q.dtype for x in given.values()):
        got = ", ".join(str(x.dtype) for x in given.values())
        raise PlanError(f"{names} must share one dtype out of float16, bfloat16 and float32, got {got}.")


def check_numbers(scale: float | None, block_q: int, block_kv: int) -> None:
    """Blocks of at least one token; a positive scale, or None."""
    if block_q < 1 or block_kv < 1:
        raise PlanError(f"block_q and block_kv must be at least 1, got {block_q} and {block_kv}.")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise PlanError(f"scale must be positive and finite, got {scale}. Negate q for a negative scale.")


def check_plan(q: Tensor, kv_counts: Tensor, kv_indices: Tensor, block_q: int) -> None:
    """int32 kv_counts [B or 1, H or 1, Mq] and kv_indices [B or 1, H or 1, Mq, W] for the queries of q."""
    if kv_counts.dtype != torch.int32 or kv_indices.dtype != torch.int32:
        raise PlanError(f"kv_counts and kv_indices must be int32, got {kv_counts.dtype} and {kv_indices.dtype}.")
    got = f"got kv_counts {list(kv_counts.shape)} and kv_indices {list(kv_indices.shape)}"
    if kv_counts.dim() != 3 or kv_indices.dim() != 4:
        raise PlanError(f"expected kv_counts [B or 1, H or 1, Mq] and kv_indices [B or 1, H or 1, Mq, W], {got}.")
    for d in range(3):
        require(kv_counts.shape[d] == kv_indices.shape[d], f"kv_counts and kv_indices disagree: {got}.")
    for d, name in enumerate(("batch", "head count")):
        if kv_counts.shape[d] != 1:
            message = f"the plan's {name} must be 1 or that of q, {q.shape[d]}; {got}."
            require(kv_counts.shape[d] == q.shape[d], message)
    rows = -(-q.shape[2] // block_q)
    require(
        kv_counts.shape[2] == rows,
        f"{q.shape[2]} queries in blocks of {block_q} make {rows} rows, but {got}. "
        "Was the plan made for another sequence length?",
    )


def check_state(counts: Tensor, indices: Tensor, refresh: Tensor, shape: Sequence[int]) -> None:
    """Contiguous int32 counts [B, H, Mq] and indices [B, H, Mq, W] of `shape`, to write to; refresh bool [1]."""
    got = f"got {counts.dtype} {list(counts.shape)} and {indices.dtype} {list(indices.shape)}."
    message = f"expected state_counts int32 {[*shape[:3]]} and state_indices int32 {[*shape]}, contiguous; {got}"
    typed = counts.dtype == indices.dtype == torch.int32
    if not (typed and counts.dim() == 3 and indices.dim() == 4):
        raise PlanError(message)
    for d, size in enumerate(shape):
        require(indices.shape[d] == size, message)
        require(d == 3 or counts.shape[d] == size, message)
    require(counts.is_contiguous() and indices.is_contiguous(), message)
    if refresh.dtype != torch.bool or refresh.dim() != 1:
        raise PlanError(f"expected refresh bool [1], got {refresh.dtype} {list(refresh.shape)}.")
    require(refresh.shape[0] == 1, f"expected refresh bool [1], got {list(refresh.shape)}.")


def check_mask(kv_mask: Tensor | None, keys: Tensor) -> None:
    """bool [B or 1, Sk] for keys [B, Hkv, Sk, D]; None is fine."""
    if kv_mask is None:
        return
    got = f"got {kv_mask.dtype} {list(kv_mask.shape)} for keys {list(keys.shape)}."
    if kv_mask.dtype != torch.bool or kv_mask.dim() != 2:
        raise PlanError(f"expected kv_mask bool [B or 1, Sk], {got}")
    if kv_mask.shape[0] != 1:
        require(kv_mask.shape[0] == keys.shape[0], f"kv_mask's batch must be 1 or that of q, {got}")
    require(kv_mask.shape[1] == keys.shape[2], f"kv_mask must cover every key, {got}")


def check_devices(q: Tensor, given: dict[str, Tensor | None], how: str) -> None:
    """All tensors on the device of q; `how`: what moves a plan there."""
    for name, tensor in given.items():
        if tensor is not None and tensor.device != q.device:
            raise PlanError(f"{name} is on {tensor.device}, q on {q.device}. Move it there ({how}).")
