"""BlockPlan: which key/value blocks each query block reads.

The layout follows PyTorch's flex `BlockMask`: a count and a list of block ids per query block. A plan knows
nothing of frames or of a model; patterns (`dynamicrad_compile.plans.make`) or users build it, the kernels read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import PlanError
from ..kernels.blocks import cdiv
from . import cost

# Mask entries that `BlockPlan.from_mask` looks at in one go.
MASK_CHUNK = 1 << 20


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
    each dropped block; 0 drops them for good. See `kernels.attention_op`.

    Raises PlanError if shapes, dtypes or ranges do not fit together.
    """

    kv_counts: torch.Tensor
    kv_indices: torch.Tensor
    block_q: int
    block_kv: int
    q_len: int
    kv_len: int
    compensate: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        counts, indices = self.kv_counts, self.kv_indices
        if counts.dtype != torch.int32 or indices.dtype != torch.int32:
            raise PlanError(f"kv_counts and kv_indices must be int32, got {counts.dtype} and {indices.dtype}.")
        if counts.dim() != 3 or indices.dim() != 4 or counts.shape != indices.shape[:3]:
            raise PlanError(
                "expected kv_counts [P, H', Mq] and kv_indices [P, H', Mq, W], got "
                f"{list(counts.shape)} and {list(indices.shape)}."
            )
        if min(self.block_q, self.block_kv, self.q_len, self.kv_len) < 1:
            raise PlanError("block_q, block_kv, q_len and kv_len must be at least 1.")
        if counts.shape[-1] != self.num_q_blocks:
            raise PlanError(
                f"q_len {self.q_len} in blocks of {self.block_q} gives {self.num_q_blocks} query blocks, "
                f"but kv_counts has {counts.shape[-1]}."
            )
        if indices.shape[-1] > self.num_kv_blocks:
            raise PlanError(f"kv_indices is {indices.shape[-1]} wide but there are {self.num_kv_blocks} kv blocks.")
        if len(self.compensate) not in (1, len(counts)) or not all(0 <= c <= 1 for c in self.compensate):
            raise PlanError(
                f"compensate must be 1 or {len(counts)} numbers in 0..1 (one a regime), got {self.compensate!r}."
            )

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
        width, m_k = self.kv_indices.shape[-1], self.num_kv_blocks
        active = torch.arange(width, device=self.kv_counts.device) < self.kv_counts[..., None]
        # Inactive entries are sent to an extra column, which is cut off.
        target = torch.where(active, self.kv_indices, m_k).long()
        mask = torch.zeros(*self.kv_counts.shape, m_k + 1, dtype=torch.bool, device=self.kv_counts.device)
        mask = mask.scatter_(-1, target, True)[..., :m_k]
        return mask | (self.kv_counts == m_k)[..., None]

    @property
    def sparsity(self) -> float:
        """Share of dense attention that is skipped, in 0..1, over all regimes and heads; compensation counts."""
        weights = torch.tensor(self.compensate, device=self.kv_counts.device)[:, None, None]
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
        return replace(self, kv_counts=self.kv_counts.to(device), kv_indices=self.kv_indices.to(device))

    @staticmethod
    def stack(plans: Sequence[BlockPlan]) -> BlockPlan:
        """One plan with the regimes of several, in order. Raises PlanError if their lengths or blocks differ."""
        first = plans[0]
        shapes = {(p.block_q, p.block_kv, p.q_len, p.kv_len) for p in plans}
        if len(shapes) != 1:
            raise PlanError(f"plans of one table must agree in block_q, block_kv, q_len and kv_len, got {shapes}.")
        width = max(p.kv_indices.shape[-1] for p in plans)
        padded = [torch.nn.functional.pad(p.kv_indices, (0, width - p.kv_indices.shape[-1])) for p in plans]
        weights = [c for p in plans for c in p.compensate * (len(p.kv_counts) // len(p.compensate))]
        return replace(
            first,
            kv_counts=torch.cat([p.kv_counts for p in plans]),
            kv_indices=torch.cat(padded),
            compensate=tuple(weights),
        )

    @staticmethod
    def from_mask(
        mask: torch.Tensor, *, block_q: int, block_kv: int, q_len: int, kv_len: int, compensate: float = 0.0
    ) -> BlockPlan:
        """Plan of a bool block mask [Mq, Mk], [H', Mq, Mk] or [P, H', Mq, Mk]; ids ascend in each row.

        Raises PlanError if the mask's shape does not fit the lengths.
        """
        if mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
            raise PlanError(f"expected a bool mask [..., Mq, Mk], got {mask.dtype} {list(mask.shape)}.")
        if mask.shape[-1] != cdiv(kv_len, block_kv):
            raise PlanError(f"kv_len {kv_len} in blocks of {block_kv} does not give {mask.shape[-1]} kv blocks.")
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        counts = mask.sum(-1, dtype=torch.int32)
        width = max(1, int(counts.max()))
        flat_mask, flat_counts = mask.reshape(-1, mask.shape[-1]), counts.flatten().long()
        indices = torch.zeros(len(flat_mask), width, dtype=torch.int32, device=mask.device)
        # Chunks of rows, because `nonzero` takes ten times the memory of the plan.
        chunk = max(1, MASK_CHUNK // mask.shape[-1])
        for low in range(0, len(flat_mask), chunk):
            # Row by row, ids ascending.
            rows, ids = flat_mask[low : low + chunk].nonzero(as_tuple=True)
            kept = flat_counts[low : low + chunk]
            place = torch.arange(len(ids), device=mask.device) - (kept.cumsum(0) - kept)[rows]
            indices[low + rows, place] = ids.to(torch.int32)
        indices = indices.reshape(*counts.shape, width)
        return BlockPlan(counts, indices, block_q, block_kv, q_len, kv_len, (compensate,))

    @staticmethod
    def from_block_mask(block_mask: Any) -> BlockPlan:
        """Plan of a PyTorch flex `BlockMask`; its partial blocks count as active.

        Batch becomes P. Token-level masking inside partial blocks is lost, except that of ragged tails.
        """
        block_q, block_kv = block_mask.BLOCK_SIZE
        q_len, kv_len = block_mask.seq_lengths
        mask = block_mask.to_dense().bool()
        return BlockPlan.from_mask(mask, block_q=block_q, block_kv=block_kv, q_len=q_len, kv_len=kv_len)

    def to_block_mask(self) -> Any:
        """PyTorch flex `BlockMask` with the plan's blocks as full blocks (no mask inside a block)."""
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
    """

    plan: BlockPlan
    kv_forced: torch.Tensor
    kv_near: torch.Tensor

    @staticmethod
    def forced(plan: BlockPlan) -> Candidates:
        """Candidates of a plan from which nothing is to be dropped."""
        return Candidates(plan, plan.kv_counts, plan.kv_counts)

    def to(self, device: torch.device | str) -> Candidates:
        """The same candidates with their tensors on `device`."""
        return Candidates(self.plan.to(device), self.kv_forced.to(device), self.kv_near.to(device))

    @staticmethod
    def stack(several: Sequence[Candidates]) -> Candidates:
        """One table with the regimes of several, in order. Raises PlanError if they do not fit together."""
        return Candidates(
            BlockPlan.stack([c.plan for c in several]),
            torch.cat([c.kv_forced for c in several]),
            torch.cat([c.kv_near for c in several]),
        )
