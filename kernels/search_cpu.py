"""CPU path of `search_blocks`: masses of all pairs of blocks, sorted once a head; the first ones are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from . import mass_cpu, workers
from .blocks import block_mask
from .pool_cpu import block_means
from .search_arguments import MAX_MASS, Search, budget, sparsities
from .workers import Buffers, Task


def scores(s: Search) -> tuple[Tensor, Tensor]:
    """fp32 [B, H, Mq, Mk], the mass of each block, and what it is ranked by.

    What overflowed is finite, so that sums are numbers.
    """
    mass = mass_cpu.mass(s.mass).clamp_(max=MAX_MASS)
    if s.rank == "mass":
        return mass, mass
    mean, count = block_means(s.k, s.block_kv, s.kv_mask)
    held = mass_cpu.mass(s.mass._replace(k=mean, block_kv=1, kv_mask=None)).clamp_(max=MAX_MASS)
    # A block without a valid key holds nothing, and its mean is 0.
    return mass, torch.addcmul(mass, held, count[:, None, None].float(), value=-1.0).clamp_(min=0.0)


class _Head:
    """The blocks of one head in the order in which they are kept.

    mass, score fp32 [Mq, Mk]; always bool [Mq, Mk], True for blocks that are kept whatever they hold.
    """

    def __init__(self, mass: Tensor, score: Tensor, always: Tensor) -> None:
        self.mass = mass
        always = always.scatter(1, score.argmax(1, keepdim=True), True)
        self.least = int(always.sum())
        first = score.masked_fill(always, float("inf"))
        self.order = first.flatten().sort(descending=True, stable=True).indices
        self.total = float(mass.sum(dtype=torch.float64))

    def keep(self, number: int) -> tuple[Tensor, float]:
        """bool [Mq, Mk], the best `number` blocks, and the share of the mass that they hold; 1 if there is none."""
        places = self.order[: max(number, self.least)]
        kept = torch.zeros(self.mass.numel(), dtype=torch.bool, device="cpu").index_fill_(0, places, True)
        held = float(self.mass.flatten()[places].sum(dtype=torch.float64))
        return kept.view(self.mass.shape), held / self.total if self.total > 0 else 1.0


def _listed(kept: Tensor, counts: Tensor, indices: Tensor) -> None:
    """Write counts int32 [Mq] and indices int32 [Mq, Mk], ascending and 0 behind the count, of kept bool [Mq, Mk]."""
    torch.sum(kept, 1, dtype=torch.int32, out=counts)
    places = torch.arange(kept.shape[1], dtype=torch.int32, device="cpu")
    first = torch.where(kept, places, kept.shape[1]).sort(1).values
    indices.copy_(first.masked_fill_(first == kept.shape[1], 0))


def choose(s: Search, mass: Tensor, score: Tensor, out_counts: Tensor, out_indices: Tensor, out_recall: Tensor) -> None:
    """Fill out_counts int32 [B, H, Mq], out_indices int32 [B, H, Mq, Mk], out_recall fp32 [B, H].

    mass, score: of `scores`.
    """
    batch, heads, n_q, n_kv = mass.shape
    always = block_mask(s.kv_counts, s.kv_indices, n_kv).expand(batch, heads, -1, -1)
    lower, upper = sparsities(s.sparsity)
    found: list[list[_Head | None]] = [[None] * heads for _ in range(batch)]

    def write(b: int, h: int, sparsity: float) -> Task:
        def task(_: Buffers) -> None:
            head = found[b][h] or _Head(mass[b, h], score[b, h], always[b, h])
            found[b][h] = head
            kept, recall = head.keep(budget(sparsity, n_q, n_kv))
            _listed(kept, out_counts[b, h], out_indices[b, h])
            out_recall[b, h] = recall

        return task

    buffers = [Buffers() for _ in range(workers.count())]
    workers.run([write(b, h, s.sparsity) for b in range(batch) for h in range(heads)], buffers)
    if s.recall_threshold >= 1:
        return
    changed: list[Task] = []
    for b in range(batch):
        order = out_recall[b].sort(descending=True, stable=True).indices.tolist()
        number = min(int((out_recall[b] > s.recall_threshold).sum()), heads // 2)
        changed += [write(b, h, upper) for h in order[:number]]
        changed += [write(b, h, lower) for h in order[heads - number :]]
    workers.run(changed, buffers)
