"""`select_blocks`: the selection op for `Candidates`, called eagerly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PlanError
from ..kernels import select_op as _registers_the_op  # noqa: F401
from .order import reordered, reordered_keys
from .plan import BlockPlan, Candidates


def select_blocks(
    q: Tensor,
    k: Tensor,
    candidates: Candidates,
    thresholds: Tensor | tuple[float, float],
    criterion: str = "threshold",
    scale: float | None = None,
    *,
    kv_mask: Tensor | None = None,
    rank: str = "mass",
) -> BlockPlan:
    """The plan of the blocks chosen out of `candidates` for these queries and keys.

    q [B, H, Sq, D], k [B, Hkv, Sk, D], fp16, bf16 or fp32, any strides; Hkv divides H; D <= 256.
    candidates: P is 1 or B; H' is 1 or H. A dense row stays dense; every row with a candidate keeps at least one.
    thresholds: fp32 [1 or B, 2], near and far, on the device of q; or the two numbers.
    criterion: "threshold", "mass" or "ratio" (see `kernels.select_op`). scale: factor on q . k, 1 / sqrt(D) if None.
    kv_mask: bool [B or 1, Sk], True where a key may be attended.
    q, k and kv_mask are in the model's order, whatever that of the candidates is.
    rank: what the criterion goes by, "mass" or "error": a block's share of the attention, or of what would be wrong if
    its mean stood for it.
    Returns a plan with counts [B, H, Mq] and indices [B, H, Mq, W], candidates in their order.
    Raises PlanError if shapes, dtypes, devices or lengths do not fit together, OptionsError for criterion and rank.
    """
    if not isinstance(candidates, Candidates):
        raise PlanError(f"expected Candidates, as make_candidates gives them, got {type(candidates).__name__}.")
    plan = candidates.plan
    for name, planned, tensor in (("queries", plan.q_len, q), ("keys", plan.kv_len, k)):
        if tensor.dim() == 4 and tensor.shape[2] != planned:
            raise PlanError(
                f"the candidates are for {planned} {name}, not for {tensor.shape[2]}. Make them for this length."
            )
    if not isinstance(thresholds, Tensor):
        thresholds = torch.tensor([thresholds], dtype=torch.float32, device=q.device)
    if plan.query_order is not None:
        q = reordered(q, plan.query_order)
    if plan.order is not None:
        k = reordered(k, plan.order)
        kv_mask = None if kv_mask is None else reordered_keys(kv_mask, plan.order)
    tables = (plan.kv_counts, plan.kv_indices, candidates.kv_forced, candidates.kv_near)
    counts, indices = torch.ops.dynamicrad.select_blocks(
        q, k, *tables, thresholds, scale, plan.block_q, plan.block_kv, criterion, kv_mask, rank
    )
    return plan.with_rows(counts, indices)
