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

from dynamicrad_compile.errors import OptionsError, PlanError, nearest

from . import select_cpu as cpu_select
from .attention_op import DTYPES, MAX_HEAD_DIM, _require, _validate_plan
from .blocks import cdiv
from .define import define
from .pool_op import pool_blocks, valid_counts
from .select_criteria import CRITERIA

try:
    from .pool_triton import KERNELS as POOLING
    from .pool_triton import launch_pooling
    from .select_triton import KERNELS as SELECTION
    from .select_triton import launch_select

    KERNELS = (*POOLING, *SELECTION)
except ImportError:  # no Triton here: CPU tensors only
    KERNELS, launch_select = None, None  # type: ignore[assignment]


def _validate(
    q: Tensor,
    k: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_forced: Tensor,
    kv_near: Tensor,
    thresholds: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    criterion: str,
    kv_mask: Tensor | None = None,
) -> None:
    """Check shapes, dtypes and devices; the values of the plan and of the thresholds are never read."""
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}."
    if not q.dim() == k.dim() == 4:
        raise PlanError(f"expected q [B, H, Sq, D] and k [B, Hkv, Sk, D], {shapes}")
    for d, name in ((0, "batch"), (3, "head_dim")):
        _require(q.shape[d] == k.shape[d], f"q and k must have the same {name}, {shapes}")
    _require(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, f"Hkv must divide H, {shapes}")
    _require(1 <= q.shape[3] <= MAX_HEAD_DIM, f"head_dim must be 1 to {MAX_HEAD_DIM}, got {q.shape[3]}.")
    if q.dtype not in DTYPES or q.dtype != k.dtype:
        raise PlanError(
            f"q and k must share one dtype out of float16, bfloat16 and float32, got {q.dtype} and {k.dtype}."
        )
    if block_q < 1 or block_kv < 1:
        raise PlanError(f"block_q and block_kv must be at least 1, got {block_q} and {block_kv}.")
    if scale is not None and not 0 < scale < float("inf"):
        raise PlanError(f"scale must be positive and finite, got {scale}. Negate q for a negative scale.")
    if criterion not in CRITERIA:
        raise OptionsError(
            f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}.{nearest(criterion, CRITERIA)}"
        )
    _validate_plan(q, kv_counts, kv_indices, block_q)
    _require(kv_indices.shape[3] >= 1, f"kv_indices must be at least one entry wide, got {list(kv_indices.shape)}.")
    for name, tensor in (("kv_forced", kv_forced), ("kv_near", kv_near)):
        got = f"got {tensor.dtype} {list(tensor.shape)} for kv_counts {list(kv_counts.shape)}."
        if tensor.dtype != torch.int32 or tensor.dim() != 3:
            raise PlanError(f"expected {name} int32 [B or 1, H or 1, Mq], {got}")
        for d in range(3):
            _require(tensor.shape[d] == kv_counts.shape[d], f"{name} must have the shape of kv_counts, {got}")
    got = f"got {thresholds.dtype} {list(thresholds.shape)} for a batch of {q.shape[0]}."
    if thresholds.dtype != torch.float32 or thresholds.dim() != 2:
        raise PlanError(f"expected thresholds float32 [B or 1, 2], near and far, {got}")
    _require(thresholds.shape[1] == 2, f"expected thresholds float32 [B or 1, 2], near and far, {got}")
    if thresholds.shape[0] != 1:
        _require(thresholds.shape[0] == q.shape[0], f"the batch of thresholds must be 1 or that of q, {got}")
    if kv_mask is not None:
        got = f"got {kv_mask.dtype} {list(kv_mask.shape)} for keys {list(k.shape)}."
        if kv_mask.dtype != torch.bool or kv_mask.dim() != 2:
            raise PlanError(f"expected kv_mask bool [B or 1, Sk], {got}")
        if kv_mask.shape[0] != 1:
            _require(kv_mask.shape[0] == q.shape[0], f"kv_mask's batch must be 1 or that of q, {got}")
        _require(kv_mask.shape[1] == k.shape[2], f"kv_mask must cover every key, {got}")
    given = {"k": k, "kv_counts": kv_counts, "kv_indices": kv_indices, "kv_forced": kv_forced, "kv_near": kv_near}
    given |= {"thresholds": thresholds} | ({} if kv_mask is None else {"kv_mask": kv_mask})
    _same_device(q, given)


def _same_device(q: Tensor, given: dict[str, Tensor]) -> None:
    for name, tensor in given.items():
        if tensor.device != q.device:
            raise PlanError(f"{name} is on {tensor.device}, q on {q.device}. Move it there (Candidates.to).")


def _validate_state(
    q: Tensor, kv_indices: Tensor, state_counts: Tensor, state_indices: Tensor, refresh: Tensor
) -> None:
    shape = [*q.shape[:2], *kv_indices.shape[2:]]
    got = f"got {state_counts.dtype} {list(state_counts.shape)} and {state_indices.dtype} {list(state_indices.shape)}."
    message = f"expected state_counts int32 {shape[:3]} and state_indices int32 {shape}, contiguous; {got}"
    typed = state_counts.dtype == state_indices.dtype == torch.int32
    if not (typed and state_counts.dim() == 3 and state_indices.dim() == 4):
        raise PlanError(message)
    for d, size in enumerate(shape):
        _require(state_indices.shape[d] == size, message)
        _require(d == 3 or state_counts.shape[d] == size, message)
    _require(state_counts.is_contiguous() and state_indices.is_contiguous(), message)
    if refresh.dtype != torch.bool or refresh.dim() != 1:
        raise PlanError(f"expected refresh bool [1], got {refresh.dtype} {list(refresh.shape)}.")
    _require(refresh.shape[0] == 1, f"expected refresh bool [1], got {list(refresh.shape)}.")
    _same_device(q, {"state_counts": state_counts, "state_indices": state_indices, "refresh": refresh})


def _launch(
    q: Tensor,
    k: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_forced: Tensor,
    kv_near: Tensor,
    thresholds: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    criterion: str,
    kv_mask: Tensor | None,
    out_counts: Tensor,
    out_indices: Tensor,
    refresh: Tensor | None,
) -> None:
    """The CUDA path: pool q and k, then choose. Kernels end at once where `refresh` is False."""
    if q.device.type != "cuda":
        raise PlanError(f"select_blocks runs on cpu and cuda tensors, got {q.device}.")
    if launch_select is None:
        raise PlanError("select_blocks needs Triton for CUDA tensors. Install triton.")
    plan = (kv_counts, kv_indices, kv_forced, kv_near, thresholds)
    n_queries = valid_counts(q.shape[2], block_q, None, q.device)
    n_keys = valid_counts(k.shape[2], block_kv, kv_mask, k.device)
    q_mean = launch_pooling(q, n_queries, block_q, None, refresh)
    k_mean = launch_pooling(k, n_keys, block_kv, kv_mask, refresh)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    launch_select(q_mean, k_mean, n_keys, *plan, scale, criterion, out_counts, out_indices, refresh)


def _outputs(q: Tensor, kv_indices: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], *kv_indices.shape[2:])
    return kv_indices.new_empty(shape[:3]), kv_indices.new_empty(shape)


def _select(
    q: Tensor,
    k: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_forced: Tensor,
    kv_near: Tensor,
    thresholds: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    criterion: str,
    kv_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    arguments = (q, k, kv_counts, kv_indices, kv_forced, kv_near, thresholds, scale, block_q, block_kv, criterion)
    if q.device.type == "cpu":
        return torch.ops.dynamicrad.select_blocks_cpu(*arguments, kv_mask)
    _validate(*arguments, kv_mask)
    out = _outputs(q, kv_indices)
    _launch(*arguments, kv_mask, *out, None)
    return out


def _select_cpu(
    q: Tensor,
    k: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_forced: Tensor,
    kv_near: Tensor,
    thresholds: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    criterion: str,
    kv_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    plan = (kv_counts, kv_indices, kv_forced, kv_near, thresholds)
    _validate(q, k, *plan, scale, block_q, block_kv, criterion, kv_mask)
    (q_mean, _), (k_mean, n_keys) = pool_blocks(q, block_q), pool_blocks(k, block_kv, kv_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = _outputs(q, kv_indices)
    cpu_select.select(q_mean, k_mean, n_keys, *plan, scale, criterion, *out)
    return out


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _validate(*arguments)
    return _outputs(arguments[0], arguments[3])


def _refresh(
    q: Tensor,
    k: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_forced: Tensor,
    kv_near: Tensor,
    thresholds: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    criterion: str,
    state_counts: Tensor,
    state_indices: Tensor,
    refresh: Tensor,
    kv_mask: Tensor | None = None,
) -> None:
    arguments = (q, k, kv_counts, kv_indices, kv_forced, kv_near, thresholds, scale, block_q, block_kv, criterion)
    if q.device.type == "cpu":
        torch.ops.dynamicrad.select_blocks_cpu_(*arguments, state_counts, state_indices, refresh, kv_mask)
        return
    _validate(*arguments, kv_mask)
    _validate_state(q, kv_indices, state_counts, state_indices, refresh)
    _launch(*arguments, kv_mask, state_counts, state_indices, refresh)


def _refresh_cpu(
    q: Tensor,
    k: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_forced: Tensor,
    kv_near: Tensor,
    thresholds: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    criterion: str,
    state_counts: Tensor,
    state_indices: Tensor,
    refresh: Tensor,
    kv_mask: Tensor | None = None,
) -> None:
    plan = (kv_counts, kv_indices, kv_forced, kv_near, thresholds)
    _validate(q, k, *plan, scale, block_q, block_kv, criterion, kv_mask)
    _validate_state(q, kv_indices, state_counts, state_indices, refresh)
    if not bool(refresh):
        return
    counts, indices = _select_cpu(q, k, *plan, scale, block_q, block_kv, criterion, kv_mask)
    state_counts.copy_(counts)
    state_indices.copy_(indices)


def _refresh_fake(*arguments: Any) -> None:
    _validate(*arguments[:11], *arguments[14:])
    _validate_state(arguments[0], arguments[3], *arguments[11:14])


_STATE = ("state_counts", "state_indices")
_op = define("dynamicrad::select_blocks", _select, KERNELS)
_op_cpu = torch.library.custom_op("dynamicrad::select_blocks_cpu", _select_cpu, mutates_args=())
_op_state = define("dynamicrad::select_blocks_", _refresh, KERNELS, _STATE)
_op_state_cpu = torch.library.custom_op("dynamicrad::select_blocks_cpu_", _refresh_cpu, mutates_args=_STATE)

_op.register_kernel("cpu")(_select_cpu)  # saves eager code the second dispatch
_op_state.register_kernel("cpu")(_refresh_cpu)
for _definition, _fake_of in (
    (_op, _fake),
    (_op_cpu, _fake),
    (_op_state, _refresh_fake),
    (_op_state_cpu, _refresh_fake),
):
    _definition.register_fake(_fake_of)


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
