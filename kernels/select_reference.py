"""Slow fp64 reference of `select_blocks`: one row at a time, plain loops. For tests and for reading."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .select_arguments import Selection

NO_ERROR = -1e300  # score of a visible block whose mean stands for it exactly, below that of any other


@dataclass
class Row:
    """Candidates of one query block: ids in their order, the first `forced` forced, the first `near` near."""

    where: tuple[int, int, int]  # sample, head, query block
    ids: list[int]
    forced: int
    near: int
    scores: list[float]  # scale * mean(q_I) . mean(k_J) + log(n_J); by error + log(e_IJ), or NO_ERROR
    dense: bool

    def shares(self, group: range) -> dict[int, float]:
        """Softmax of the scores over the positions in `group`; zeros if every one of them is hidden."""
        top = max((self.scores[j] for j in group), default=-math.inf)
        if top == -math.inf:
            return dict.fromkeys(group, 0.0)
        weights = {j: math.exp(self.scores[j] - top) for j in group}
        return {j: w / sum(weights.values()) for j, w in weights.items()}

    @property
    def groups(self) -> tuple[range, range]:
        """Positions of the near and of the far candidates, forced ones excluded."""
        return range(self.forced, self.near), range(self.near, len(self.ids))


def _block(x: torch.Tensor, i: int, block: int, usable: torch.Tensor) -> torch.Tensor:
    """fp64 [n, D], the usable tokens of block i of x [S, D]."""
    inside = slice(i * block, (i + 1) * block)
    return x[inside].double()[usable[inside]]


def score(s: Selection, queries: torch.Tensor, keys: torch.Tensor) -> float:
    """Score of a block of keys [n, D] for a block of queries [m, D], both fp64; -inf without a key."""
    if not len(keys):
        return -math.inf
    mean = keys.mean(0)
    found = s.factor * float(queries.mean(0) @ mean) + math.log(len(keys))
    if s.rank == "mass":
        return found
    square, variance = queries.square().mean(0), (keys - mean).square().mean(0)
    error = s.factor**2 / 2 * float(square @ variance)
    return found + math.log(error) if error else NO_ERROR


def candidate_rows(s: Selection) -> Iterator[Row]:
    """The rows of all samples and heads, with their scores."""
    batch, heads, q_len, _ = s.q.shape
    kv_len, rep = s.k.shape[2], heads // s.k.shape[1]
    plans, plan_heads, rows = s.kv_counts.shape
    n_kv = -(-kv_len // s.block_kv)
    for b in range(batch):
        every = torch.ones(q_len, dtype=torch.bool, device="cpu")
        usable = (
            torch.ones(kv_len, dtype=torch.bool, device="cpu")
            if s.kv_mask is None
            else s.kv_mask[b % s.kv_mask.shape[0]]
        )
        for h in range(heads):
            keys = [_block(s.k[b, h // rep], j, s.block_kv, usable) for j in range(n_kv)]
            for i in range(rows):
                at = (b % plans, h % plan_heads, i)
                count = int(s.kv_counts[at])
                if count >= n_kv:
                    yield Row((b, h, i), [], 0, 0, [], True)
                    continue
                queries = _block(s.q[b, h], i, s.block_q, every)
                # Out of range values are clamped, as by the kernels.
                ids = s.kv_indices[at][: max(0, count)].clamp(0, n_kv - 1).tolist()
                scores = [score(s, queries, keys[j]) for j in ids]
                forced = min(max(0, int(s.kv_forced[at])), len(ids))
                near = min(max(forced, int(s.kv_near[at])), len(ids))
                yield Row((b, h, i), ids, forced, near, scores, False)


def log_or_hidden(x: float) -> float:
    """log(x), -inf for 0."""
    return math.log(x) if x else -math.inf


def choose(row: Row, thresholds: tuple[float, float], criterion: str) -> list[int]:
    """Positions of the candidates that are kept, ascending."""
    n = len(row.ids)
    row_shares = row.shares(range(n))
    kept = set(range(row.forced))
    for group, threshold in zip(row.groups, thresholds, strict=True):
        shares = row.shares(group)
        best_first = sorted(group, key=lambda j: -row.scores[j])  # stable: of equal ones the earlier first
        if criterion == "threshold":
            kept |= {j for j in group if log_or_hidden(n * row_shares[j]) >= threshold}
        elif threshold >= 1:
            kept |= set(group)
        elif not threshold > 0:  # nor for NaN
            continue
        elif criterion == "mass":
            target, mass = threshold * sum(shares[j] for j in group), 0.0
            for j in best_first:
                if mass >= target:
                    break
                kept.add(j)
                mass += shares[j]
        else:
            size = torch.tensor(threshold, dtype=torch.float32, device="cpu") * len(group)  # rounded as in the kernels
            kept |= set(best_first[: math.ceil(float(size))])
    if not kept and n:
        kept = {max(range(n), key=lambda j: (row.scores[j], -j))}
    return sorted(kept)


def select_blocks_reference(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts int32 [B, H, Mq], indices int32 [B, H, Mq, W]) of the op's arguments."""
    s = Selection(*args, **kwargs)
    counts = torch.zeros(*s.q.shape[:2], s.kv_counts.shape[2], dtype=torch.int32, device="cpu")
    indices = torch.zeros(*counts.shape, s.kv_indices.shape[3], dtype=torch.int32, device="cpu")
    for row in candidate_rows(s):
        if row.dense:
            counts[row.where] = -(-s.k.shape[2] // s.block_kv)
            continue
        near, far = s.thresholds[row.where[0] % s.thresholds.shape[0]].tolist()
        kept = [row.ids[j] for j in choose(row, (near, far), s.criterion)]
        counts[row.where] = len(kept)
        indices[row.where][: len(kept)] = torch.tensor(kept, dtype=torch.int32, device="cpu")
    return counts, indices
