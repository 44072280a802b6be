"""`block_sparse_attention`: the attention op for a `BlockPlan`, called eagerly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PlanError
from ..kernels import moments_op as _registers_the_ops  # noqa: F401
from .order import inverse, reorder, reordered_keys
from .plan import BlockPlan


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float | None = None,
    *,
    kv_length: Tensor | Sequence[int] | None = None,
    kv_mask: Tensor | None = None,
    compensate: float | Tensor | None = None,
    covariance: bool | None = None,
    qk_dtype: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the active blocks of `plan`.

    q [B, H, Sq, D], k and v [B, Hkv, Sk, D], fp16, bf16 or fp32, any strides; Hkv divides H; D <= 256. On CUDA
    the plan's blocks must be multiples of 16 tokens, up to 256.
    plan: P is 1 (one plan for the batch) or B (one per sample); H' is 1 or H. Where it has an order, q, k, v, the
    masks and the results are in the model's order all the same.
    scale: factor on q . k, 1 / sqrt(D) if None; positive.
    kv_length: int [B], keys of each sample that count, the rest is right padding.
    kv_mask: bool [B or 1, Sk], True where a key may be attended; with kv_length both must allow it.
    compensate: 0 to 1, or fp32 [B or 1] on q's device: weight of the one extra key, its mean, by which each block
    that a row drops is still represented; 0 drops it, None: the plan's. It costs Sk / block_kv keys per query.
    covariance: dropped blocks stand with their covariances too (`kernels.moments_op`), None: the plan's; nothing
    without compensation.
    qk_dtype: "int8" takes scores from queries and keys rounded to int8, row by row (`kernels.quantise`): faster on
    GPUs, with an error of about 1 %; the gradient is that of unrounded ones. None: from q and k as they are.
    Returns out [B, H, Sq, D], contiguous, dtype of q; with return_lse also lse fp32 [B, H, Sq], natural
    logarithm. A query with no key gives out = 0 and lse = -inf.
    Raises PlanError if shapes, dtypes, devices or lengths do not fit together, or a number is out of range.
    """
    if not isinstance(plan, BlockPlan):
        raise PlanError(f"expected a BlockPlan, as make_plan gives it, got {type(plan).__name__}.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise PlanError(f"{name} must be a tensor, got {type(x).__name__}.")
    for name, planned, tensor in (("queries", plan.q_len, q), ("keys", plan.kv_len, k)):
        if tensor.dim() == 4 and tensor.shape[2] != planned:
            raise PlanError(
                f"the plan is for {planned} {name}, not for {tensor.shape[2]}. Make a plan for this length."
            )
    if kv_length is not None:
        lengths = torch.as_tensor(kv_length, device=q.device)
        if lengths.dim() != 1 or lengths.is_floating_point():
            raise PlanError(f"expected kv_length int [B], got {lengths.dtype} {list(lengths.shape)}.")
        within = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        kv_mask = within if kv_mask is None else within & kv_mask
    if qk_dtype not in (None, "int8"):
        raise PlanError(f"qk_dtype must be None or 'int8', got {qk_dtype!r}.")
    if compensate is None:
        compensate = plan.compensation()
    if not isinstance(compensate, torch.Tensor) and compensate is not None:
        if not 0 <= compensate <= 1:
            raise PlanError(f"compensate must be 0 to 1, got {compensate}.")
        # Filled on the device: a copy of a host number would wait for it.
        weight = torch.full((1,), float(compensate), dtype=torch.float32, device=q.device)
        compensate = weight if compensate > 0 else None
    op = torch.ops.dynamicrad.block_sparse_attention
    if (plan.covariance if covariance is None else covariance) and compensate is not None:
        op = torch.ops.dynamicrad.second_order_attention
    order, q_order = plan.order, plan.query_order
    if q_order is not None:
        q_back = inverse(q_order)
        q = reorder(q, q_order, q_back)
    if order is not None:
        back = q_back if order is q_order else inverse(order)
        k, v = (reorder(x, order, back) for x in (k, v))
        kv_mask = None if kv_mask is None else reordered_keys(kv_mask, order)
    out, lse = op(
        *(q, k, v, plan.kv_counts, plan.kv_indices, scale, plan.block_q, plan.block_kv, kv_mask),
        *(compensate, qk_dtype == "int8"),
    )
    if q_order is not None:
        out = reorder(out, q_back, q_order)
        lse = reorder(lse.unsqueeze(-1), q_back, q_order).squeeze(-1)
    return (out, lse) if return_lse else out
