"""BlockPlan: which key/value blocks each query block reads.

The layout follows PyTorch's flex `BlockMask`: a count and a list of block ids per query block. A plan knows
nothing of frames or of a model; patterns (`dynamicrad_compile.plans.make`) or users build it, the kernels read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import PlanError
from ..kernels.blocks import block_mask, cdiv
from . import cost, values

# Mask entries that `BlockPlan.from_mask` looks at in one go.
MASK_CHUNK = 1 << 18
ORDERS = ("order", "q_order")
"""Fields of a plan that are orders of tokens."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Active key/value blocks per query block.

    kv_counts   int32 [P, H', Mq]      number of active kv blocks of a query block
    kv_indices  int32 [P, H', Mq, W]   their ids, active ones first; entries past the count are padding (0)
    block_q, block_kv                  block sizes in tokens
    q_len, kv_len                      sequence lengths in tokens; the last block may be partial

    P is the number of regimes (1 = one for all), H' the number of heads (1 = shared by all heads),
    Mq = ceil(q_len / block_q), Mk = ceil(kv_len / block_kv), W >= the widest row.
    A row whose count is Mk is dense and its indices are not read: a gate can make rows dense by `kv_counts`
    alone.

    compensate, one number in 0..1 for each regime (or one for all), is the weight of the mean key that stands for
    each dropped block; 0 drops them for good. See `kernels.attention_op`. With covariance it stands there with the
    covariances of the block (`kernels.moments_op`).

    order, int64 [P or 1, kv_len], where blocks are cut from the tokens in another order (`plans.order`): the token of
    each place, a permutation. It is that of the keys, and of the queries where they are as many. q_order, int64
    [P or 1, q_len]: of queries with an order of their own. None: blocks are cut from the tokens as they come.

    check_values: counts and ids are looked at once, here, which copies those of a GPU to the host. False where they are
    known to be right; nor can they be looked at inside a graph, or on fake tensors.

    Raises PlanError if shapes, dtypes, devices or ranges do not fit together, or a row lists a block twice.
    """

    kv_counts: torch.Tensor
    kv_indices: torch.Tensor
    block_q: int
    block_kv: int
    q_len: int
    kv_len: int
    compensate: tuple[float, ...] = (0.0,)
    covariance: bool = False
    order: torch.Tensor | None = None
    q_order: torch.Tensor | None = None
    check_values: InitVar[bool] = True

    def __post_init__(self, check_values: bool) -> None:
        counts, indices = self.kv_counts, self.kv_indices
        _check_tensors(kv_counts=counts, kv_indices=indices)
        if counts.dtype != torch.int32 or indices.dtype != torch.int32:
            raise PlanError(f"kv_counts and kv_indices must be int32, got {counts.dtype} and {indices.dtype}.")
        if counts.dim() != 3 or indices.dim() != 4 or counts.shape != indices.shape[:3]:
            raise PlanError(
                "expected kv_counts [P, H', Mq] and kv_indices [P, H', Mq, W], got "
                f"{list(counts.shape)} and {list(indices.shape)}."
            )
        if 0 in counts.shape:
            raise PlanError(f"a plan needs a regime, a head and a row at least, got kv_counts {list(counts.shape)}.")
        _check_sizes(block_q=self.block_q, block_kv=self.block_kv, q_len=self.q_len, kv_len=self.kv_len)
        if counts.shape[-1] != self.num_q_blocks:
            raise PlanError(
                f"q_len {self.q_len} in blocks of {self.block_q} gives {self.num_q_blocks} query blocks, "
                f"but kv_counts has {counts.shape[-1]}."
            )
        if indices.shape[-1] > self.num_kv_blocks:
            raise PlanError(f"kv_indices is {indices.shape[-1]} wide but there are {self.num_kv_blocks} kv blocks.")
        if isinstance(self.compensate, list):
            object.__setattr__(self, "compensate", tuple(self.compensate))
        weights = self.compensate
        if not isinstance(weights, tuple) or len(weights) not in (1, len(counts)) or not all(map(_is_share, weights)):
            raise PlanError(f"compensate must be 1 or {len(counts)} numbers in 0..1 (one a regime), got {weights!r}.")
        self._check_order("order", self.order, self.kv_len)
        self._check_order("q_order", self.q_order, self.q_len)
        if check_values and values.can_be_read(counts, indices):
            values.check_plan(counts, indices, self.num_kv_blocks)
            for name in ORDERS:
                values.check_order(name, getattr(self, name))

    def _check_order(self, name: str, order: torch.Tensor | None, length: int) -> None:
        if order is None:
            return
        _check_tensors(kv_counts=self.kv_counts, **{name: order})
        sizes = {(1, length), (len(self.kv_counts), length)}
        if order.dtype != torch.int64 or tuple(order.shape) not in sizes:
            raise PlanError(
                f"expected {name} int64 [1 or {len(self.kv_counts)}, {length}], got {order.dtype} {list(order.shape)}."
            )

    @property
    def query_order(self) -> torch.Tensor | None:
        """The order of the queries: their own, else that of the keys where they are as many; None: as they come."""
        return self.order if self.q_order is None and self.q_len == self.kv_len else self.q_order

    @property
    def num_q_blocks(self) -> int:
        """Mq."""
        return cdiv(self.q_len, self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        """Mk."""
        return cdiv(self.kv_len, self.block_kv)

    def block_mask(self) -> torch.Tensor:
        """bool [P, H', Mq, Mk]: True where the query block reads the key/value block."""
        return block_mask(self.kv_counts, self.kv_indices, self.num_kv_blocks)

    @property
    def sparsity(self) -> float:
        """Share of dense attention that is skipped, in 0..1, over all regimes and heads; compensation counts."""
        weights = torch.tensor(self.compensate, dtype=torch.float32, device=self.kv_counts.device)[:, None, None]
        return 1.0 - float(cost.computed(self.kv_counts, weights, self.num_kv_blocks, self.block_kv))

    def compensation(self) -> torch.Tensor | None:
        """fp32 [P] for the op's `compensate`, on the plan's device; None where no regime compensates."""
        if not any(self.compensate):
            return None
        weights = self.compensate * (len(self.kv_counts) // len(self.compensate))
        # Filled on the device: a copy of host numbers would wait for it.
        return torch.cat([torch.full((1,), w, dtype=torch.float32, device=self.kv_counts.device) for w in weights])

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan with its tensors on `device`."""
        names = ("kv_counts", "kv_indices", *ORDERS)
        moved: dict[str, Any] = {name: None if (x := getattr(self, name)) is None else x.to(device) for name in names}
        return replace(self, **moved, check_values=False)

    def with_rows(self, kv_counts: torch.Tensor, kv_indices: torch.Tensor) -> BlockPlan:
        """The plan of other rows, whose values are known to be right: a second look would wait for the device."""
        return replace(self, kv_counts=kv_counts, kv_indices=kv_indices, check_values=False)

    def one(self, number: int) -> BlockPlan:
        """The plan of one regime alone."""
        own = slice(number, number + 1)
        weights = self.compensate if len(self.compensate) == 1 else self.compensate[own]
        orders = {name: x if x is None or len(x) == 1 else x[own] for name in ORDERS for x in [getattr(self, name)]}
        counts, indices = self.kv_counts[own], self.kv_indices[own]
        return replace(self, kv_counts=counts, kv_indices=indices, compensate=weights, **orders, check_values=False)

    @staticmethod
    def stack(plans: Sequence[BlockPlan]) -> BlockPlan:
        """One plan with the regimes of several, in order; with covariances if one of them has them.

        Raises PlanError if there is none, or if their lengths, blocks, heads or devices differ.
        """
        if not plans:
            raise PlanError("expected at least one plan to stack, got none.")
        first = plans[0]
        shapes = {(p.block_q, p.block_kv, p.q_len, p.kv_len) for p in plans}
        if len(shapes) != 1:
            raise PlanError(f"plans of one table must agree in block_q, block_kv, q_len and kv_len, got {shapes}.")
        places = {(p.kv_counts.shape[1], str(p.kv_counts.device)) for p in plans}
        if len(places) != 1:
            raise PlanError(f"plans of one table must agree in their number of heads and their device, got {places}.")
        width = max(p.kv_indices.shape[-1] for p in plans)
        padded = [torch.nn.functional.pad(p.kv_indices, (0, width - p.kv_indices.shape[-1])) for p in plans]
        weights = [c for p in plans for c in p.compensate * (len(p.kv_counts) // len(p.compensate))]
        return replace(
            first,
            kv_counts=torch.cat([p.kv_counts for p in plans]),
            kv_indices=torch.cat(padded),
            compensate=tuple(weights),
            covariance=any(p.covariance for p in plans),
            order=_stacked_orders([(p, p.order) for p in plans], first.kv_len),
            q_order=_stacked_queries(plans),
            check_values=False,
        )

    @staticmethod
    def from_mask(
        mask: torch.Tensor, *, block_q: int, block_kv: int, q_len: int, kv_len: int, compensate: float = 0.0
    ) -> BlockPlan:
        """Plan of a bool block mask [Mq, Mk], [H', Mq, Mk] or [P, H', Mq, Mk]; ids ascend in each row.

        Raises PlanError if the mask's dtype or shape does not fit the lengths.
        """
        _check_tensors(mask=mask)
        if mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
            raise PlanError(f"expected a bool mask [..., Mq, Mk], got {mask.dtype} {list(mask.shape)}.")
        _check_sizes(block_q=block_q, block_kv=block_kv, q_len=q_len, kv_len=kv_len)
        if 0 in mask.shape:
            raise PlanError(f"a plan needs a regime, a head, a row and a block at least, got {list(mask.shape)}.")
        if mask.shape[-1] != cdiv(kv_len, block_kv):
            raise PlanError(f"kv_len {kv_len} in blocks of {block_kv} does not give {mask.shape[-1]} kv blocks.")
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        counts = mask.sum(-1, dtype=torch.int32)
        width = max(1, int(counts.max()))
        flat_mask, flat_counts = mask.reshape(-1, mask.shape[-1]), counts.reshape(-1, 1)
        indices = torch.zeros(len(flat_mask), width, dtype=torch.int32, device=mask.device)
        place, every = (torch.arange(n, dtype=torch.int32, device=mask.device) for n in (width, mask.shape[-1]))
        # Chunks of rows stay in the processor's cache.
        chunk = max(1, MASK_CHUNK // mask.shape[-1])
        for low in range(0, len(flat_mask), chunk):
            rows = slice(low, low + chunk)
            ids = every.expand_as(flat_mask[rows])[flat_mask[rows]]  # row by row, ascending
            indices[rows].masked_scatter_(place < flat_counts[rows], ids)
        indices = indices.reshape(*counts.shape, width)
        return BlockPlan(counts, indices, block_q, block_kv, q_len, kv_len, (compensate,), check_values=False)

    @staticmethod
    def from_block_mask(block_mask: Any) -> BlockPlan:
        """Plan of a PyTorch flex `BlockMask`; its partial blocks count as active.

        Batch becomes P. Token-level masking inside partial blocks is lost, except that of ragged tails.
        Raises PlanError if it is none, or its counts and ids are out of range.
        """
        from torch.nn.attention.flex_attention import BlockMask

        if not isinstance(block_mask, BlockMask):
            raise PlanError(f"expected a flex BlockMask, got {type(block_mask).__name__}.")
        block_q, block_kv = block_mask.BLOCK_SIZE
        q_len, kv_len = block_mask.seq_lengths
        partial = (block_mask.kv_num_blocks, block_mask.kv_indices)
        full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        masks = [
            BlockPlan(counts.int(), indices.int(), block_q, block_kv, q_len, kv_len).block_mask()
            for counts, indices in (partial, full)
            if counts is not None
        ]
        mask = torch.stack(masks).any(0)
        return BlockPlan.from_mask(mask, block_q=block_q, block_kv=block_kv, q_len=q_len, kv_len=kv_len)

    def to_block_mask(self) -> Any:
        """PyTorch flex `BlockMask` with the plan's blocks as full blocks (no mask inside a block).

        It knows no order of tokens: q has to be put into `query_order`, k and v into `order`, and the output back.
        """
        from torch.nn.attention.flex_attention import BlockMask

        m_k = self.num_kv_blocks
        width = self.kv_indices.shape[-1]
        indices = torch.nn.functional.pad(self.kv_indices, (0, m_k - width))
        every_block = torch.arange(m_k, dtype=torch.int32, device=indices.device)
        indices = torch.where((self.kv_counts == m_k)[..., None], every_block, indices)
        # Separate tensors for partial and full blocks: the CPU template can't take one tensor twice.
        return BlockMask.from_kv_blocks(
            kv_num_blocks=torch.zeros_like(self.kv_counts),
            kv_indices=torch.zeros_like(indices),
            full_kv_num_blocks=self.kv_counts.clone(),
            full_kv_indices=indices.clone(),
            BLOCK_SIZE=(self.block_q, self.block_kv),
            seq_lengths=(self.q_len, self.kv_len),
            compute_q_blocks=False,
        )


@dataclass(frozen=True, eq=False)
class Candidates:
    """Blocks that a row may read, for a choice at run time by `select_blocks`.

    plan       its rows are ordered [forced | near | far]
    kv_forced  int32 [P, H', Mq]: the first so many entries of a row are always kept
    kv_near    int32 [P, H', Mq]: the first so many (at least kv_forced) entries lie in the same frame, in an adjacent
               one or in a sink frame

    check_values as of `BlockPlan`. Raises PlanError if shapes, dtypes or devices do not fit together, or unless
    0 <= kv_forced <= kv_near <= kv_counts in each row.
    """

    plan: BlockPlan
    kv_forced: torch.Tensor
    kv_near: torch.Tensor
    check_values: InitVar[bool] = True

    def __post_init__(self, check_values: bool) -> None:
        if not isinstance(self.plan, BlockPlan):
            raise PlanError(f"expected a BlockPlan, got {type(self.plan).__name__}.")
        counts = self.plan.kv_counts
        _check_tensors(kv_counts=counts, kv_forced=self.kv_forced, kv_near=self.kv_near)
        for name, x in (("kv_forced", self.kv_forced), ("kv_near", self.kv_near)):
            if x.dtype != torch.int32 or x.shape != counts.shape:
                wanted = f"int32 {list(counts.shape)}, as kv_counts"
                raise PlanError(f"expected {name} {wanted}, got {x.dtype} {list(x.shape)}.")
        if check_values and values.can_be_read(counts, self.kv_forced, self.kv_near):
            values.check_classes(counts, self.kv_forced, self.kv_near)

    @staticmethod
    def forced(plan: BlockPlan) -> Candidates:
        """Candidates of a plan from which nothing is to be dropped."""
        return Candidates(plan, plan.kv_counts, plan.kv_counts, check_values=False)

    def to(self, device: torch.device | str) -> Candidates:
        """The same candidates with their tensors on `device`."""
        forced, near = self.kv_forced.to(device), self.kv_near.to(device)
        return Candidates(self.plan.to(device), forced, near, check_values=False)

    @staticmethod
    def stack(several: Sequence[Candidates]) -> Candidates:
        """One table with the regimes of several, in order. Raises PlanError if they do not fit together."""
        return Candidates(
            BlockPlan.stack([c.plan for c in several]),
            torch.cat([c.kv_forced for c in several]),
            torch.cat([c.kv_near for c in several]),
            check_values=False,
        )


def _stacked_queries(plans: Sequence[BlockPlan]) -> torch.Tensor | None:
    """The orders of the queries; None where those of the keys, or none, stand for them."""
    if all(plan.q_order is None for plan in plans):
        return None
    return _stacked_orders([(p, p.query_order) for p in plans], plans[0].q_len)


def _stacked_orders(given: Sequence[tuple[BlockPlan, torch.Tensor | None]], length: int) -> torch.Tensor | None:
    """The orders of the regimes of several plans: one row if they are the same, else a row each."""
    if all(order is None for _, order in given):
        return None
    rows = []
    for plan, order in given:
        if order is None:
            order = torch.arange(length, dtype=torch.int64, device=plan.kv_counts.device).unsqueeze(0)
        rows.append(order.expand(len(plan.kv_counts), -1))
    whole = torch.cat(rows)
    return whole[:1] if all(torch.equal(row, whole[0]) for row in whole[1:]) else whole


def _check_tensors(**given: Any) -> None:
    """Raise PlanError unless all are tensors on one device."""
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise PlanError(f"{name} must be a tensor, got {type(x).__name__}.")
    devices = {name: str(x.device) for name, x in given.items()}
    if len(set(devices.values())) > 1:
        raise PlanError(f"the tensors of a plan must be on one device, got {devices}. BlockPlan.to moves a plan.")


def _is_share(x: Any) -> bool:
    return isinstance(x, (int, float, np.number)) and bool(0 <= x <= 1)


def _check_sizes(**given: Any) -> None:
    """Raise PlanError unless all are integers of at least 1."""
    for name, n in given.items():
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt, np.integer)) or n < 1:
            raise PlanError(f"{name} must be an integer of at least 1, got {n!r}.")
