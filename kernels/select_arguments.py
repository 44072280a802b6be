"""The arguments that the selection ops share, and how they are checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynamicrad_compile.errors import OptionsError, PlanError, nearest

from .checks import check_devices, check_mask, check_numbers, check_operands, check_plan, check_state, require
from .select_criteria import CRITERIA, RANKS

HOW = "Candidates.to"


class Selection(NamedTuple):
    """Arguments of `select_blocks`, in their order. P is 1 or B, H' is 1 or H."""

    q: Tensor  # [B, H, Sq, D], any strides, as k
    k: Tensor  # [B, Hkv, Sk, D]
    kv_counts: Tensor  # int32 [P, H', Mq], candidates of a row
    kv_indices: Tensor  # int32 [P, H', Mq, W], ordered [forced | near | far]
    kv_forced: Tensor  # int32 [P, H', Mq], so many are always kept
    kv_near: Tensor  # int32 [P, H', Mq], so many (at least kv_forced) are forced or near
    thresholds: Tensor  # fp32 [B or 1, 2], of near and far
    scale: float | None  # 1 / sqrt(D) if None
    block_q: int
    block_kv: int
    criterion: str
    kv_mask: Tensor | None = None  # bool [B or 1, Sk], True where a key may be attended
    rank: str = "mass"  # what the criterion goes by

    @property
    def factor(self) -> float:
        """The scale as a number."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale


class State(NamedTuple):
    """A choice that `select_blocks_` writes over where `refresh` is True."""

    state_counts: Tensor  # int32 [B, H, Mq] contiguous
    state_indices: Tensor  # int32 [B, H, Mq, W] contiguous
    refresh: Tensor  # bool [1]


_REQUIRED = len(Selection._fields) - len(Selection._field_defaults)


def with_state(selection: tuple[Any, ...], state: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `select_blocks_`, or their names: the state in front of what has a default."""
    return (*selection[:_REQUIRED], *state, *selection[_REQUIRED:])


def without_state(arguments: tuple[Any, ...]) -> tuple[Selection, State]:
    """What `with_state` put together."""
    end = _REQUIRED + len(State._fields)
    return Selection(*arguments[:_REQUIRED], *arguments[end:]), State(*arguments[_REQUIRED:end])


def check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    """Raise OptionsError unless the name is one of those known."""
    if name not in known:
        raise OptionsError(f"{what} must be one of {', '.join(known)}, got {name!r}.{nearest(name, known)}")


def check(s: Selection) -> None:
    """Raise PlanError or OptionsError unless the arguments fit; values of plan and thresholds are never read."""
    check_operands(s.q, s.k)
    check_numbers(s.scale, s.block_q, s.block_kv)
    check_name("criterion", s.criterion, CRITERIA)
    check_name("rank", s.rank, RANKS)
    check_plan(s.q, s.kv_counts, s.kv_indices, s.block_q)
    width = s.kv_indices.shape[3]
    require(width >= 1, f"kv_indices must be at least one entry wide, got {list(s.kv_indices.shape)}.")
    for name, tensor in (("kv_forced", s.kv_forced), ("kv_near", s.kv_near)):
        got = f"got {tensor.dtype} {list(tensor.shape)} for kv_counts {list(s.kv_counts.shape)}."
        if tensor.dtype != torch.int32 or tensor.dim() != 3:
            raise PlanError(f"expected {name} int32 [B or 1, H or 1, Mq], {got}")
        for d in range(3):
            require(tensor.shape[d] == s.kv_counts.shape[d], f"{name} must have the shape of kv_counts, {got}")
    got = f"got {s.thresholds.dtype} {list(s.thresholds.shape)} for a batch of {s.q.shape[0]}."
    if s.thresholds.dtype != torch.float32 or s.thresholds.dim() != 2:
        raise PlanError(f"expected thresholds float32 [B or 1, 2], near and far, {got}")
    require(s.thresholds.shape[1] == 2, f"expected thresholds float32 [B or 1, 2], near and far, {got}")
    if s.thresholds.shape[0] != 1:
        require(s.thresholds.shape[0] == s.q.shape[0], f"the batch of thresholds must be 1 or that of q, {got}")
    check_mask(s.kv_mask, s.k)
    given = {"k": s.k, "kv_counts": s.kv_counts, "kv_indices": s.kv_indices, "kv_forced": s.kv_forced}
    check_devices(s.q, {**given, "kv_near": s.kv_near, "thresholds": s.thresholds, "kv_mask": s.kv_mask}, HOW)


def check_selection_state(s: Selection, state: State) -> None:
    """Raise PlanError unless the state has room for a choice."""
    check_state(*state, (*s.q.shape[:2], *s.kv_indices.shape[2:]))
    check_devices(s.q, dict(state._asdict()), HOW)
