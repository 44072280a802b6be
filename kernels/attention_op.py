"""The op `dynamicrad::block_sparse_attention`.

    out[i] = sum_j softmax_j(scale * q_i . k_j) v_j        over the keys j of the active blocks of i's block
    lse[i] = log sum_j exp(scale * q_i . k_j)

With `compensate` = c > 0 every other block J with n_J valid keys adds one key to both sums: its mean key with
log(n_J) + log(c) on the score, and its mean value. Then the softmax is not renormalised without the mass of what
was dropped. With `dropped_only` the sums are over those means alone, without the active blocks: what `second_order`
corrects before both parts are merged.

CUDA runs the Triton kernel of `triton_forward`; the op is a `triton_op`, so Inductor and AOTInductor see the
kernel itself. CPU runs `cpu.forward`, which those compilers see as the opaque op
`dynamicrad::block_sparse_attention_cpu`. The gradient is that of `backward`. Nothing here synchronises a CUDA device
with the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynamicrad_compile.errors import PlanError

from . import attention_backward_op as backward
from . import attention_cpu as cpu
from . import moments_op as _registers_second_order  # noqa: F401
from . import quantise
from .blocks import cdiv
from .define import define
from .means import means_of

try:
    from .attention_triton import KERNELS, launch_forward
except ImportError:  # no Triton here: CPU tensors only
    KERNELS, launch_forward = None, None  # type: ignore[assignment]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def _require(condition: Any, message: str) -> None:
    """Raise PlanError unless `condition`; a symbolic one is left to the call with real tensors."""
    if not isinstance(condition, torch.SymBool) and not condition:
        raise PlanError(message)


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None,
    mask_start: int,
    compensate: Tensor | None,
) -> None:
    """Check shapes, dtypes and devices; the values of counts, indices and compensate are never read."""
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}."
    if not q.dim() == k.dim() == v.dim() == 4:
        raise PlanError(f"expected q [B, H, Sq, D], k and v [B, Hkv, Sk, D], {shapes}")
    for d, name in enumerate(("batch", "head count", "length", "head_dim")):
        _require(k.shape[d] == v.shape[d], f"k and v must have the same {name}, {shapes}")
        if name in ("batch", "head_dim"):
            _require(q.shape[d] == k.shape[d], f"q and k must have the same {name}, {shapes}")
    _require(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, f"Hkv must divide H, {shapes}")
    _require(1 <= q.shape[3] <= MAX_HEAD_DIM, f"head_dim must be 1 to {MAX_HEAD_DIM}, got {q.shape[3]}.")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise PlanError(
            "q, k and v must share one dtype out of float16, bfloat16 and float32, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if block_q < 1 or block_kv < 1:
        raise PlanError(f"block_q and block_kv must be at least 1, got {block_q} and {block_kv}.")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise PlanError(f"scale must be positive and finite, got {scale}. Negate q for a negative scale.")
    _validate_plan(q, kv_counts, kv_indices, block_q)
    if mask_start < 0:
        raise PlanError(f"mask_start must be at least 0, got {mask_start}.")
    if kv_mask is not None:
        got = f"got {kv_mask.dtype} {list(kv_mask.shape)} for keys {list(k.shape)}."
        if kv_mask.dtype != torch.bool or kv_mask.dim() != 2:
            raise PlanError(f"expected kv_mask bool [B or 1, Sk], {got}")
        if kv_mask.shape[0] != 1:
            _require(kv_mask.shape[0] == q.shape[0], f"kv_mask's batch must be 1 or that of q, {got}")
        _require(kv_mask.shape[1] == k.shape[2], f"kv_mask must cover every key, {got}")
    if compensate is not None:
        got = f"got {compensate.dtype} {list(compensate.shape)} for a batch of {q.shape[0]}."
        if compensate.dtype != torch.float32 or compensate.dim() != 1:
            raise PlanError(f"expected compensate float32 [B or 1], {got}")
        if compensate.shape[0] != 1:
            _require(compensate.shape[0] == q.shape[0], f"compensate's batch must be 1 or that of q, {got}")
    given = {"k": k, "v": v, "kv_counts": kv_counts, "kv_indices": kv_indices, "kv_mask": kv_mask}
    given["compensate"] = compensate
    for name, tensor in given.items():
        if tensor is not None and tensor.device != q.device:
            raise PlanError(f"{name} is on {tensor.device}, q on {q.device}. Move it there (BlockPlan.to for plans).")


def _require_compensation(compensate: Tensor | None, dropped_only: bool) -> None:
    """The means of the dropped blocks alone are nothing without their weight."""
    if dropped_only and compensate is None:
        raise PlanError("dropped_only needs compensate, the weight of the dropped blocks' means.")


def _validate_plan(q: Tensor, kv_counts: Tensor, kv_indices: Tensor, block_q: int) -> None:
    if kv_counts.dtype != torch.int32 or kv_indices.dtype != torch.int32:
        raise PlanError(f"kv_counts and kv_indices must be int32, got {kv_counts.dtype} and {kv_indices.dtype}.")
    got = f"got kv_counts {list(kv_counts.shape)} and kv_indices {list(kv_indices.shape)}"
    if kv_counts.dim() != 3 or kv_indices.dim() != 4:
        raise PlanError(f"expected kv_counts [B or 1, H or 1, Mq] and kv_indices [B or 1, H or 1, Mq, W], {got}.")
    for d in range(3):
        _require(kv_counts.shape[d] == kv_indices.shape[d], f"kv_counts and kv_indices disagree: {got}.")
    for d, name in enumerate(("batch", "head count")):
        if kv_counts.shape[d] != 1:
            message = f"the plan's {name} must be 1 or that of q, {q.shape[d]}; {got}."
            _require(kv_counts.shape[d] == q.shape[d], message)
    rows = cdiv(q.shape[2], block_q)
    _require(
        kv_counts.shape[2] == rows,
        f"{q.shape[2]} queries in blocks of {block_q} make {rows} rows, but {got}. "
        "Was the plan made for another sequence length?",
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None = None,
    mask_start: int = 0,
    compensate: Tensor | None = None,
    qk_int8: bool = False,
    dropped_only: bool = False,
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.dynamicrad.block_sparse_attention_cpu(
            *(q, k, v, kv_counts, kv_indices, scale, block_q, block_kv, kv_mask, mask_start, compensate),
            *(qk_int8, dropped_only),
        )
    _validate(q, k, v, kv_counts, kv_indices, scale, block_q, block_kv, kv_mask, mask_start, compensate)
    _require_compensation(compensate, dropped_only)
    if q.device.type != "cuda":
        raise PlanError(f"block_sparse_attention runs on cpu and cuda tensors, got {q.device}.")
    if launch_forward is None:
        raise PlanError("block_sparse_attention needs Triton for CUDA tensors. Install triton.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    means = None
    if compensate is not None:
        means = means_of(k, v, kv_counts, kv_indices, block_kv, kv_mask, compensate)
    read = torch.zeros_like(kv_counts) if dropped_only else kv_counts
    plan = (read, kv_indices, scale, block_q, block_kv)
    return launch_forward(q, k, v, *plan, kv_mask, mask_start, means, qk_int8=qk_int8)


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None = None,
    mask_start: int = 0,
    compensate: Tensor | None = None,
    qk_int8: bool = False,
    dropped_only: bool = False,
) -> tuple[Tensor, Tensor]:
    _validate(q, k, v, kv_counts, kv_indices, scale, block_q, block_kv, kv_mask, mask_start, compensate)
    _require_compensation(compensate, dropped_only)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not qk_int8:
        plan = (kv_counts, kv_indices, scale, block_q, block_kv)
        return cpu.forward(q, k, v, *plan, kv_mask, compensate, dropped_only)
    mean = quantise.mean_key(k)
    q8, k8 = (quantise.dequantise(x).to(q.dtype) for x in (quantise.quantise(q), quantise.quantise(k, mean)))
    plan = (kv_counts, kv_indices, scale, block_q, block_kv)
    out, lse = cpu.forward(q8, k8, v, *plan, kv_mask, compensate, dropped_only)
    return out, lse + quantise.shift(q, mean, scale)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None = None,
    mask_start: int = 0,
    compensate: Tensor | None = None,
    qk_int8: bool = False,
    dropped_only: bool = False,
) -> tuple[Tensor, Tensor]:
    _validate(q, k, v, kv_counts, kv_indices, scale, block_q, block_kv, kv_mask, mask_start, compensate)
    _require_compensation(compensate, dropped_only)
    # Contiguous whatever the strides of q: both kernels allocate their output, empty_like would copy strides.
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


_op = define("dynamicrad::block_sparse_attention", _forward, KERNELS)
_op_cpu = torch.library.custom_op("dynamicrad::block_sparse_attention_cpu", _forward_cpu, mutates_args=())
_op.register_kernel("cpu")(_forward_cpu)  # saves eager code the second dispatch
for _definition in (_op, _op_cpu):
    _definition.register_fake(_fake)
    _definition.register_autograd(backward.gradients, setup_context=backward.save)


@register_flop_formula(
    [torch.ops.dynamicrad.block_sparse_attention, torch.ops.dynamicrad.block_sparse_attention_cpu], get_raw=True
)
def flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None = None,
    mask_start: int = 0,
    compensate: Tensor | None = None,
    qk_int8: bool = False,
    dropped_only: bool = False,
    **kwargs: Any,
) -> int:
    """FLOPs of the two matrix products: 4 * head_dim * (query, key) pairs in active blocks.

    Ragged tails count their real length; keys hidden by kv_mask inside an active block count. With compensation
    each query adds one key per block, kept or not, unless its row is dense or its sample's weight is 0. With
    real tensors the value is exact, and reading the counts of a CUDA plan waits for the device. With fake
    tensors every row is taken to be W blocks wide, an upper bound as long as no row is gated to dense.
    """
    batch, heads, q_len, dim = q.shape
    kv_len, m_k = k.shape[2], cdiv(k.shape[2], block_kv)
    if isinstance(kv_counts, torch._subclasses.FakeTensor) or kv_counts.device.type == "meta":
        keys_per_query = min(kv_indices.shape[-1] * block_kv, kv_len) + (0 if compensate is None else m_k)
        keys_per_query = m_k if dropped_only else keys_per_query
        return 4 * dim * batch * heads * q_len * keys_per_query
    counts, ids = kv_counts.cpu().long(), kv_indices.cpu()
    active = torch.arange(ids.shape[-1]) < counts[..., None]
    holds_tail = (active & (ids == m_k - 1)).any(-1)
    keys = counts * block_kv - torch.where(holds_tail, m_k * block_kv - kv_len, 0)
    keys = torch.where(counts >= m_k, kv_len, keys)
    keys = torch.zeros_like(keys) if dropped_only else keys
    if compensate is not None:
        keys = keys + m_k * ((counts < m_k) & (compensate.cpu() > 0)[:, None, None])
    rows = torch.full((keys.shape[2],), block_q)
    rows[-1] = q_len - (keys.shape[2] - 1) * block_q
    repeats = batch * heads // (keys.shape[0] * keys.shape[1])
    return 4 * dim * repeats * int((keys * rows).sum())
