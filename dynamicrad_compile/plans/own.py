"""A plan of the user's (option `plan`): a BlockPlan, a bool block mask, or a function of the grid that gives one."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..errors import PlanError
from ..kernels.blocks import cdiv
from ..profiles.parameters import BLOCK_SIZES
from .layout import Range
from .plan import BlockPlan
from .shares import heads_of
from .table import PlanTable

EXPECTED = (
    "expected a BlockPlan, a bool block mask [M, N] or [heads, M, N] (tensor or array, True where a block is read), "
    "or a function (grid, text_before, text_after) that returns one of them, or None for dense attention"
)


class SharedMask:
    """A block mask that can be compared with another one, as Dynamo does to see whether two models may share graphs."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        self._key = (tuple(mask.shape), hashlib.sha256(mask.numpy().tobytes()).digest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def checked(value: Any) -> Any:
    """The value, if it can be a plan whatever the site: arrays as tensors, all on the CPU. Raises PlanError."""
    if isinstance(value, BlockPlan):
        return _checked_plan(value.to("cpu"))
    if isinstance(value, SharedMask):
        return value.mask
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        return _checked_mask(value.detach().cpu())
    if callable(value):
        return value
    raise PlanError(f"{EXPECTED}; got {type(value).__name__}.")


def _checked_mask(mask: torch.Tensor) -> torch.Tensor:
    shape = list(mask.shape)
    if mask.dtype != torch.bool or mask.dim() not in (2, 3) or shape[-2] > shape[-1]:
        raise PlanError(f"{EXPECTED}; got {mask.dtype} {shape}.")
    _check_rows(mask.sum(-1))
    return mask


def _checked_plan(plan: BlockPlan) -> BlockPlan:
    """A plan for one sequence and one regime whose rows all read something."""
    if len(plan.kv_counts) != 1:
        raise PlanError(f"a plan of one's own has one regime (P = 1), got {len(plan.kv_counts)}.")
    if plan.q_len > plan.kv_len:
        raise PlanError(f"queries are among the keys, but the plan has {plan.q_len} queries and {plan.kv_len} keys.")
    _check_rows(plan.kv_counts[0])
    return plan


def _check_rows(counts: torch.Tensor) -> None:
    """counts [Mq] or [H', Mq]: blocks that each row reads."""
    empty = (counts < 1).nonzero()
    if len(empty):
        *head, row = empty[0].tolist()
        where = f" of head {head[0]}" if head else ""
        raise PlanError(f"query block {row}{where} reads no block: every row needs at least one, such as its own.")


def block_size_of(blocks: Sequence[int], tokens: Sequence[int]) -> int:
    """The block size that cuts queries and keys into so many blocks.

    blocks, tokens: of queries, of keys. Raises PlanError where no size does, or more than one.
    """
    asked, read = tokens
    sizes = {size: (cdiv(asked, size), cdiv(read, size)) for size in BLOCK_SIZES}
    fitting = [size for size, found in sizes.items() if found == tuple(blocks)]
    mask = "a mask of {} x {} blocks".format(*blocks)
    if not fitting:
        if asked == read:
            counts = ", ".join(f"{found[1]} of {size}" for size, found in sizes.items())
            raise PlanError(f"{mask} does not fit {read} tokens, which are {counts}.")
        counts = ", ".join(f"{found[0]} x {found[1]} of {size}" for size, found in sizes.items())
        raise PlanError(f"{mask} does not fit {asked} queries of {read} keys, which are {counts}.")
    if len(fitting) > 1:
        raise PlanError(f"{mask} may have blocks of {fitting} tokens: give block_size.")
    return fitting[0]


@dataclass(frozen=True, eq=False)
class OwnPlan:
    """The option `plan`, for the sites of one graph: each grid's table is made once, so that its sites share it.

    value       as `checked` gives it
    block_size  of masks; None: the one that fits the sequence
    compensate  weight of the mean keys of dropped blocks; None: that of the BlockPlan, 0 for a mask
    covariance  whether dropped blocks have their covariances; None: as the BlockPlan says, not for a mask
    """

    value: Any
    block_size: int | None = None
    compensate: float | None = None
    covariance: bool | None = None
    made: dict[Any, PlanTable | None] = field(default_factory=dict)

    @property
    def follows_grid(self) -> bool:
        """Whether it is a function, which gives every grid its own plan."""
        return not isinstance(self.value, (BlockPlan, torch.Tensor))

    @property
    def takes_queries(self) -> bool:
        """Whether it can be for queries that are some of the tokens: of functions those with a parameter `queries`."""
        if not self.follows_grid:
            return True
        try:
            parameters = inspect.signature(self.value).parameters.values()
        except ValueError:  # a builtin that does not say
            return False
        return any(p.name == "queries" or p.kind is p.VAR_KEYWORD for p in parameters)

    def table(
        self,
        grid: tuple[int, int, int],
        text: Sequence[int],
        heads: int,
        device: torch.device,
        queries: Range | None = None,
    ) -> PlanTable | None:
        """The plan of a site of (frames, height, width) latent tokens with text (before, after) around it.

        queries: (start, stop) of these tokens that ask; None: all. A function is told of them where they are not all.
        None where the function gives None. Raises PlanError, which says what does not fit; for a function also where it
        raises an error of its own, and with the grid.
        """
        key = (grid, tuple(text), heads, queries)
        if key not in self.made:
            plan = self._plan(grid, text[0], text[1], queries) if self.follows_grid else self.value
            if plan is not None:
                plan = self._fitted(plan, grid, text, heads, device, queries)
            self.made[key] = None if plan is None else PlanTable.of(plan)
        return self.made[key]

    def heads(self, table: PlanTable, heads: Sequence[int]) -> PlanTable:
        """The table of some heads, in their order, of one that has rows for each; made once, as that is."""
        key = (table, tuple(heads))
        found = self.made.get(key) or PlanTable.of(heads_of(table.plan, heads))
        self.made[key] = found
        return found

    def _plan(self, grid: tuple[int, int, int], text_before: int, text_after: int, queries: Range | None) -> Any:
        """What the function gives for a grid."""
        asked = {} if queries is None else {"queries": queries}
        try:
            found = self.value(grid, text_before, text_after, **asked)
        except Exception as error:
            where = _where(grid, (text_before, text_after))
            raise PlanError(f"option plan: the function failed for {where}: {type(error).__name__}: {error}") from error
        if found is None:
            return None
        if not isinstance(found, (BlockPlan, torch.Tensor, np.ndarray)):
            where = _where(grid, (text_before, text_after))
            raise PlanError(f"option plan: for {where} the function gave {type(found).__name__}; {EXPECTED}.")
        return found

    def _fitted(
        self,
        plan: Any,
        grid: tuple[int, int, int],
        text: Sequence[int],
        heads: int,
        device: torch.device,
        queries: Range | None,
    ) -> BlockPlan:
        frames, height, width = grid
        tokens = frames * height * width + sum(text)
        asked = tokens if queries is None else queries[1] - queries[0]
        try:
            plan = checked(plan)
            if isinstance(plan, torch.Tensor):
                size = self.block_size or block_size_of(plan.shape[-2:], (asked, tokens))
                plan = BlockPlan.from_mask(plan, block_q=size, block_kv=size, q_len=asked, kv_len=tokens)
            if plan.kv_len != tokens:
                raise PlanError(f"the plan is for {plan.kv_len} tokens, the sequence has {tokens}.")
            if plan.q_len != asked:
                raise PlanError(f"the plan is for {plan.q_len} queries, of the sequence {asked} tokens ask.")
            if plan.kv_counts.shape[1] not in (1, heads):
                raise PlanError(f"the plan is for {plan.kv_counts.shape[1]} heads, the attention has {heads}.")
            sizes = (plan.block_q, plan.block_kv)
            if device.type == "cuda" and any(size % 16 or size > 256 for size in sizes):
                raise PlanError(f"blocks must be multiples of 16 tokens up to 256 on CUDA, got {sizes}.")
        except PlanError as error:
            raise PlanError(f"option plan, {_where(grid, text)}: {error}") from None
        given = {"compensate": None if self.compensate is None else (self.compensate,), "covariance": self.covariance}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(plan, **changes, check_values=False) if changes else plan


def _where(grid: Sequence[int], text: Sequence[int]) -> str:
    around = f" with text tokens {text[0]} + {text[1]}" if any(text) else ""
    return f"grid {'x'.join(map(str, grid))}{around}"
