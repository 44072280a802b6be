"""The arguments that the attention ops share, how they are checked, and the products that they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynamicrad_compile.errors import PlanError

from .blocks import cdiv, in_range
from .checks import check_devices, check_mask, check_numbers, check_operands, check_plan, require


class Attention(NamedTuple):
    """Arguments of `block_sparse_attention`, `means_attention` and `second_order_attention`, in their order.

    P is 1 or B, H' is 1 or H. A row whose count is Mk is dense, and its indices are not read. The ids of a row differ;
    counts and ids that are out of range are clamped (`blocks.in_range`), because ops never look at values.
    """

    q: Tensor  # [B, H, Sq, D], any strides, as k and v
    k: Tensor  # [B, Hkv, Sk, D]
    v: Tensor  # [B, Hkv, Sk, D]
    kv_counts: Tensor  # int32 [P, H', Mq]
    kv_indices: Tensor  # int32 [P, H', Mq, W]
    scale: float | None  # 1 / sqrt(D) if None
    block_q: int
    block_kv: int
    kv_mask: Tensor | None = None  # bool [B or 1, Sk], True where a key may be attended
    compensate: Tensor | None = None  # fp32 [B or 1], weight of the mean key of a dropped block
    qk_int8: bool = False  # scores from int8 products; the backward ignores it

    @property
    def factor(self) -> float:
        """The scale as a number."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def num_kv_blocks(self) -> int:
        """Mk."""
        return cdiv(self.k.shape[2], self.block_kv)


class Means(NamedTuple):
    """Mean keys and values of all blocks, and which rows already read them in full: what kernels take."""

    keys: Tensor  # [B, Hkv, Mk, D] contiguous, dtype of k
    values: Tensor  # [B, Hkv, Mk, D] contiguous, dtype of v
    counts: Tensor  # int32 [B or 1, Mk], valid keys
    weight: Tensor  # fp32 [B or 1], the op's `compensate`; nothing is added where it is not positive
    bits: Tensor  # int32 [P, H', Mq, ceil(Mk / 32)], of `means.kept_bits`


class Results(NamedTuple):
    """Results of the forward, and the gradients of a loss with respect to them."""

    out: Tensor  # [B, H, Sq, D], dtype of q, as its gradient
    lse: Tensor  # fp32 [B, H, Sq], as its gradient
    grad_out: Tensor
    grad_lse: Tensor


def check(a: Attention) -> None:
    """Raise PlanError unless shapes, dtypes and devices fit; counts, indices and compensate are never read."""
    check_operands(a.q, a.k, a.v)
    check_numbers(a.scale, a.block_q, a.block_kv)
    check_plan(a.q, a.kv_counts, a.kv_indices, a.block_q)
    check_mask(a.kv_mask, a.k)
    if a.compensate is not None:
        got = f"got {a.compensate.dtype} {list(a.compensate.shape)} for a batch of {a.q.shape[0]}."
        if a.compensate.dtype != torch.float32 or a.compensate.dim() != 1:
            raise PlanError(f"expected compensate float32 [B or 1], {got}")
        if a.compensate.shape[0] != 1:
            require(a.compensate.shape[0] == a.q.shape[0], f"compensate's batch must be 1 or that of q, {got}")
    given = {"k": a.k, "v": a.v, "kv_counts": a.kv_counts, "kv_indices": a.kv_indices, "kv_mask": a.kv_mask}
    check_devices(a.q, {**given, "compensate": a.compensate}, "BlockPlan.to for plans")


def check_means(a: Attention) -> None:
    """`check`, and that there is a weight: the means of dropped blocks are nothing without it."""
    check(a)
    if a.compensate is None:
        raise PlanError("means_attention needs compensate, the weight of the dropped blocks' means; got None.")


def outputs(a: Attention) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, lse). Contiguous whatever the strides of q, as the kernels allocate them."""
    return a.q.new_empty(a.q.shape), a.q.new_empty(a.q.shape[:3], dtype=torch.float32)


def _has_no_values(a: Attention) -> bool:
    return isinstance(a.kv_counts, torch._subclasses.FakeTensor) or a.kv_counts.device.type == "meta"


def _pairs(a: Attention, keys: Tensor) -> int:
    """(query, key) pairs of rows that read `keys` [B or 1, H or 1, Mq] each; the last row may be ragged."""
    rows = torch.full((keys.shape[2],), a.block_q, dtype=torch.int64, device="cpu")
    rows[-1] = a.q.shape[2] - (keys.shape[2] - 1) * a.block_q
    repeats = a.q.shape[0] * a.q.shape[1] // (keys.shape[0] * keys.shape[1])
    return repeats * int((keys * rows).sum())


def kept_pairs(a: Attention) -> int:
    """(query, key) pairs in active blocks. Tails count their real length, keys hidden by kv_mask count.

    Exact for real tensors, and waits for the device of a CUDA plan. For fake ones every row is taken to be W blocks
    wide, an upper bound as long as no row is gated to dense.
    """
    (batch, heads, q_len, _), kv_len, m_k = a.q.shape, a.k.shape[2], a.num_kv_blocks
    if _has_no_values(a):
        return batch * heads * q_len * min(a.kv_indices.shape[-1] * a.block_kv, kv_len)
    counts, ids = in_range(a.kv_counts.cpu().long(), a.kv_indices.cpu(), m_k)
    active = torch.arange(ids.shape[-1], device="cpu") < counts[..., None]
    holds_tail = (active & (ids == m_k - 1)).any(-1)
    keys = counts * a.block_kv - torch.where(holds_tail, m_k * a.block_kv - kv_len, 0)
    return _pairs(a, torch.where(counts >= m_k, kv_len, keys))


def mean_pairs(a: Attention) -> int:
    """(query, mean) pairs: one for each block, kept or not, unless a row is dense or its sample's weight is 0."""
    if a.compensate is None:
        return 0
    batch, heads, q_len, _ = a.q.shape
    if _has_no_values(a):
        return batch * heads * q_len * a.num_kv_blocks
    read = (a.kv_counts.cpu() < a.num_kv_blocks) & (a.compensate.cpu() > 0)[:, None, None]
    return _pairs(a, a.num_kv_blocks * read.long())
