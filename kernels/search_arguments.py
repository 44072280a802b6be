"""The arguments that the search ops share, how they are checked, and how many blocks a head may keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynamicrad_compile.errors import OptionsError, PlanError

from .blocks import cdiv
from .checks import check_devices, check_mask, check_numbers, check_operands, check_plan, check_state, require
from .mass_arguments import BlockMass, check_lse
from .select_arguments import check_name
from .select_criteria import RANKS

MAX_MASS = 1e30
"""What overflowed counts as this, so that sums are numbers."""


class Search(NamedTuple):
    """Arguments of `search_blocks`, in their order. P is 1 or B, H' is 1 or H."""

    q: Tensor  # [B, H, Sq, D], any strides, as k and lse
    k: Tensor  # [B, Hkv, Sk, D]
    lse: Tensor  # fp32 [B, H, Sq], of these queries and keys or of those of an earlier step
    kv_counts: Tensor  # int32 [P, H', Mq], blocks that are kept whatever they hold; Mk: a dense row
    kv_indices: Tensor  # int32 [P, H', Mq, W]
    sparsity: float  # mean over heads
    recall_threshold: float  # heads above it may get sparser; 1: every head has the same sparsity
    scale: float | None  # 1 / sqrt(D) if None
    block_q: int
    block_kv: int
    kv_mask: Tensor | None = None  # bool [B or 1, Sk], True where a key may be attended
    rank: str = "mass"  # what a block is ranked by

    @property
    def mass(self) -> BlockMass:
        """The arguments of `block_mass` among them."""
        return BlockMass(self.q, self.k, self.lse, self.scale, self.block_q, self.block_kv, self.kv_mask)


class SearchState(NamedTuple):
    """A choice that `search_blocks_` writes over where `refresh` is True."""

    state_counts: Tensor  # int32 [B, H, Mq] contiguous
    state_indices: Tensor  # int32 [B, H, Mq, Mk] contiguous
    state_recall: Tensor  # fp32 [B, H] contiguous
    refresh: Tensor  # bool [1]


_REQUIRED = len(Search._fields) - len(Search._field_defaults)


def with_search_state(search: tuple[Any, ...], state: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `search_blocks_`, or their names: the state in front of what has a default."""
    return (*search[:_REQUIRED], *state, *search[_REQUIRED:])


def without_search_state(arguments: tuple[Any, ...]) -> tuple[Search, SearchState]:
    """What `with_search_state` put together."""
    end = _REQUIRED + len(SearchState._fields)
    return Search(*arguments[:_REQUIRED], *arguments[end:]), SearchState(*arguments[_REQUIRED:end])


def sparsities(sparsity: float) -> tuple[float, float]:
    """(lower, upper) sparsity of heads whose recall is low and high; their mean is `sparsity`."""
    lower = (3 * sparsity - 1) / 2
    return (lower, (1 + sparsity) / 2) if lower >= 0 else (0.0, 2 * sparsity)


def budget(sparsity: float, n_q: int, n_kv: int) -> int:
    """Blocks that a head keeps of n_q x n_kv: round((1 - sparsity) * n_q * n_kv)."""
    return round((1 - sparsity) * n_q * n_kv)


def check(s: Search) -> None:
    """Raise PlanError or OptionsError unless the arguments fit; values of tensors are never read."""
    check_operands(s.q, s.k)
    check_numbers(s.scale, s.block_q, s.block_kv)
    check_lse(s.q, s.lse)
    check_name("rank", s.rank, RANKS)
    if not 0 <= s.sparsity <= 1:
        raise OptionsError(f"sparsity must be in 0..1, got {s.sparsity}.")
    if not s.recall_threshold >= 0:
        raise OptionsError(
            "recall_threshold must be at least 0 (1 or more: all heads get the same sparsity), "
            f"got {s.recall_threshold}."
        )
    check_plan(s.q, s.kv_counts, s.kv_indices, s.block_q)
    require(s.k.shape[2] >= 1, f"there must be a key to search for, got k {list(s.k.shape)}.")
    check_mask(s.kv_mask, s.k)
    given = {"k": s.k, "lse": s.lse, "kv_counts": s.kv_counts, "kv_indices": s.kv_indices, "kv_mask": s.kv_mask}
    check_devices(s.q, given, "BlockPlan.to for plans")


def check_search_state(s: Search, state: SearchState) -> None:
    """Raise PlanError unless the state has room for a choice."""
    shape = (*s.q.shape[:2], s.kv_counts.shape[2], cdiv(s.k.shape[2], s.block_kv))
    check_state(state.state_counts, state.state_indices, state.refresh, shape)
    recall = state.state_recall
    message = f"expected state_recall float32 {list(shape[:2])}, contiguous; got {recall.dtype} {list(recall.shape)}."
    if recall.dtype != torch.float32 or recall.dim() != 2:
        raise PlanError(message)
    for d in range(2):
        require(recall.shape[d] == shape[d], message)
    require(recall.is_contiguous(), message)
    check_devices(s.q, dict(state._asdict()), "Tensor.to")
