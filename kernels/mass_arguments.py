"""The arguments of `block_mass`, and how they are checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynamicrad_compile.errors import PlanError

from .blocks import cdiv
from .checks import check_devices, check_mask, check_numbers, check_operands, require


class BlockMass(NamedTuple):
    """Arguments of `block_mass`, in their order."""

    q: Tensor  # [B, H, Sq, D], any strides, as k and lse
    k: Tensor  # [B, Hkv, Sk, D]
    lse: Tensor  # fp32 [B, H, Sq], of these queries and keys or of those of an earlier step
    scale: float | None  # 1 / sqrt(D) if None
    block_q: int
    block_kv: int
    kv_mask: Tensor | None = None  # bool [B or 1, Sk], True where a key may be attended

    @property
    def factor(self) -> float:
        """The scale as a number."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Mq, Mk)."""
        batch, heads, q_len, _ = self.q.shape
        return batch, heads, cdiv(q_len, self.block_q), cdiv(self.k.shape[2], self.block_kv)


def check_lse(q: Tensor, lse: Tensor) -> None:
    """fp32 [B, H, Sq] for queries [B, H, Sq, D]."""
    got = f"got {lse.dtype} {list(lse.shape)} for q {list(q.shape)}."
    if lse.dtype != torch.float32 or lse.dim() != 3:
        raise PlanError(f"expected lse float32 [B, H, Sq], as block_sparse_attention returns it, {got}")
    for d in range(3):
        require(lse.shape[d] == q.shape[d], f"lse must have q's batch, heads and length, {got}")


def check(m: BlockMass) -> None:
    """Raise PlanError unless shapes, dtypes and devices fit; no value is read."""
    check_operands(m.q, m.k)
    check_numbers(m.scale, m.block_q, m.block_kv)
    check_lse(m.q, m.lse)
    check_mask(m.kv_mask, m.k)
    check_devices(m.q, {"k": m.k, "lse": m.lse, "kv_mask": m.kv_mask}, "Tensor.to")
