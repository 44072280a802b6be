"""Slow fp64 reference of `search_blocks`: one head after the other, plain loops. For tests and for reading."""

from __future__ import annotations

from typing import Any

import torch

from .mass_reference import block_mass_reference
from .search_arguments import MAX_MASS, Search, budget, sparsities


def scores_reference(s: Search) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 [B, H, Mq, Mk], the mass of each block, and what it is ranked by."""
    mass = block_mass_reference(*s.mass).clamp(max=MAX_MASS)
    if s.rank == "mass":
        return mass, mass
    held = torch.zeros_like(mass)  # what the mean keys of the blocks hold, n times each
    for b in range(s.q.shape[0]):
        valid = torch.ones(s.k.shape[2], dtype=torch.bool, device="cpu")
        valid = valid if s.kv_mask is None else s.kv_mask[b % s.kv_mask.shape[0]]
        for j in range(mass.shape[3]):
            inside = slice(j * s.block_kv, (j + 1) * s.block_kv)
            keys = s.k[b : b + 1, :, inside].double()[:, :, valid[inside]]
            if n := keys.shape[2]:
                own = s.mass._replace(q=s.q[b : b + 1].double(), k=keys.mean(2, keepdim=True), lse=s.lse[b : b + 1])
                of_mean = block_mass_reference(*own._replace(block_kv=1, kv_mask=None))[0, :, :, 0]
                held[b, :, :, j] = n * of_mean.clamp(max=MAX_MASS)
    return mass, (mass - held).clamp(min=0)


def _best_first(values: list[float]) -> list[int]:
    """Places of the values, largest first, the earlier of equals first."""
    return sorted(range(len(values)), key=lambda place: -values[place])


def _kept(score: torch.Tensor, always: set[tuple[int, int]], number: int) -> set[tuple[int, int]]:
    """Pairs of blocks of one head with scores [Mq, Mk]: `always`, and the best of the others up to `number`."""
    n_q, n_kv = score.shape
    pairs = [(i, j) for i in range(n_q) for j in range(n_kv)]
    kept = set(always)
    for place in _best_first([float(score[pair]) for pair in pairs]):
        if len(kept) >= number:
            break
        kept.add(pairs[place])
    return kept


def _always(s: Search, b: int, h: int, score: torch.Tensor) -> set[tuple[int, int]]:
    """Pairs of blocks of one head that are kept whatever they hold, and the best block of each row."""
    n_q, n_kv = score.shape
    plans, heads, _ = s.kv_counts.shape
    found = set()
    for i in range(n_q):
        at = (b % plans, h % heads, i)
        count = int(s.kv_counts[at])
        # Out of range values are clamped, as by the kernels.
        ids = s.kv_indices[at][: max(0, count)].clamp(0, n_kv - 1).tolist()
        found |= {(i, j) for j in (range(n_kv) if count >= n_kv else ids)}
        found.add((i, _best_first(score[i].tolist())[0]))
    return found


def choose_reference(
    s: Search, mass: torch.Tensor, score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(counts int32 [B, H, Mq], indices int32 [B, H, Mq, Mk], recall fp64 [B, H]) of mass and score [B, H, Mq, Mk]."""
    batch, heads, n_q, n_kv = mass.shape
    counts = torch.zeros(batch, heads, n_q, dtype=torch.int32, device="cpu")
    indices = torch.zeros(batch, heads, n_q, n_kv, dtype=torch.int32, device="cpu")
    recall = torch.zeros(batch, heads, dtype=torch.float64, device="cpu")

    def held(kept: set[tuple[int, int]], b: int, h: int) -> float:
        total = float(mass[b, h].double().sum())
        return sum(float(mass[b, h][pair]) for pair in kept) / total if total > 0 else 1.0

    for b in range(batch):
        always = [_always(s, b, h, score[b, h]) for h in range(heads)]
        own = [s.sparsity] * heads
        first = [_kept(score[b, h], always[h], budget(s.sparsity, n_q, n_kv)) for h in range(heads)]
        recalls = [held(first[h], b, h) for h in range(heads)]
        number = min(sum(r > s.recall_threshold for r in recalls), heads // 2)
        if s.recall_threshold < 1 and number:
            order, (lower, upper) = _best_first(recalls), sparsities(s.sparsity)
            for h in order[:number]:
                own[h] = upper
            for h in order[-number:]:
                own[h] = lower
        for h in range(heads):
            kept = _kept(score[b, h], always[h], budget(own[h], n_q, n_kv))
            recall[b, h] = held(kept, b, h)
            for i in range(n_q):
                ids = sorted(j for row, j in kept if row == i)
                counts[b, h, i] = len(ids)
                indices[b, h, i, : len(ids)] = torch.tensor(ids, dtype=torch.int32, device="cpu")
    return counts, indices, recall


def search_blocks_reference(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(counts int32 [B, H, Mq], indices int32 [B, H, Mq, Mk], recall fp64 [B, H]) of the op's arguments."""
    s = Search(*args, **kwargs)
    return choose_reference(s, *scores_reference(s))
