"""CPU path of `select_blocks`: one GEMM of the pooled queries and keys, gathered at the candidates, then a choice.

Rank "error" takes a second GEMM, of the mean squares of queries and the variances of keys. Its scores leave out the
constant log(scale^2 / 2), which no criterion sees. They are -inf for hidden blocks, NO_ERROR for those without
variance, and at least LEAST_SCORE for all others.

Rows are handled in chunks of CHUNK_BYTES that run side by side (`workers`). A chunk scores all pairs of its rows
and blocks, because one GEMM is cheaper here than gathering keys, and sorts its rows once where the criterion
needs their order.
"""

from __future__ import annotations

import torch

from . import workers
from .blocks import in_range
from .select_arguments import Selection
from .workers import Buffers, Task

CHUNK_BYTES = 4 << 20  # temporaries of one task
BYTES_PER_CANDIDATE = 64  # ids, scores, their order, masks and sums of one candidate of one row
MAX_SCORE = 3.0e38  # a score that overflowed; finite, so that differences are numbers
LEAST_SCORE = -2.0e37
NO_ERROR = -3.0e37  # its distance to MAX_SCORE is finite
LEAST_ERROR = 1.2e-38  # fp32 has no full precision below it


def _below_best(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """scores [h, r, W] minus the best one of `group` (bool [h or 1, r, W]), at most 0; -inf outside."""
    scores = scores.masked_fill(~group, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    return scores - torch.where(torch.isneginf(top), 0.0, top)


def _choose(
    scores: torch.Tensor,
    listed: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor],
    thresholds: torch.Tensor,
    criterion: str,
) -> torch.Tensor:
    """bool [h, r, W], the candidates of `groups` (bool [h or 1, r, W], near and far) that are kept.

    scores fp32 [h, r, W], -inf where not `listed`; thresholds fp32 [2].
    """
    if criterion == "threshold":
        below = _below_best(scores, listed)
        total = below.exp().sum(-1, keepdim=True)
        average = torch.where(total > 0, total, 1.0).log() - listed.sum(-1, keepdim=True).log()
        log_share = below - average
        return (groups[0] & (log_share >= thresholds[0])) | (groups[1] & (log_share >= thresholds[1]))
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(order, dtype=torch.bool)
    for group, threshold in zip(groups, thresholds, strict=True):
        member = group.expand_as(order).gather(-1, order)
        own = member.float()
        if criterion == "mass":
            # From the group's own best score on, or the masses of a faint group would vanish.
            own *= _below_best(scores, group).exp().gather(-1, order)
        before = own.cumsum(-1) - own
        target = own.sum(-1, keepdim=True) * threshold
        target = target.ceil() if criterion == "ratio" else target
        kept |= member & ((before < target) | (threshold >= 1))
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _rows(
    scores: torch.Tensor,
    thresholds: torch.Tensor,
    criterion: str,
    counts: torch.Tensor,
    indices: torch.Tensor,
    forced: torch.Tensor,
    near: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [h, r] and indices [h, r, W] of what is kept.

    scores fp32 [h, r, Mk] of all pairs; thresholds fp32 [2]; counts, forced, near int32 [h or 1, r]; indices int32
    [h or 1, r, W].
    """
    n_kv, width = scores.shape[-1], indices.shape[-1]
    place = torch.arange(width, device="cpu")
    dense = (counts >= n_kv)[..., None]
    listed = (place < counts[..., None]) & ~dense
    is_forced = listed & (place < forced[..., None])
    is_near = listed & ~is_forced & (place < near[..., None])
    is_far = listed & ~is_forced & ~is_near
    ids = torch.where(listed, indices, 0).expand(scores.shape[0], -1, -1)
    scores = scores.gather(-1, ids.long()).masked_fill_(~listed, float("-inf"))
    scores = scores.nan_to_num_(float("-inf"), MAX_SCORE, float("-inf"))
    kept = is_forced | _choose(scores, listed, (is_near, is_far), thresholds, criterion)
    kept |= listed & ~kept.any(-1, keepdim=True) & (place == scores.argmax(-1, keepdim=True))
    total = kept.sum(-1, dtype=torch.int32)
    # What is dropped goes to an extra column, which is cut off.
    target = torch.where(kept, kept.cumsum(-1) - 1, width)
    out = torch.zeros(*kept.shape[:2], width + 1, dtype=torch.int32, device="cpu").scatter_(-1, target, ids)
    return torch.where(dense[..., 0], n_kv, total), out[..., :width]


def _pairs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """fp32 [g * rep, r, Mk], products of x [g, rep, r, D] and y [g, Mk, D]."""
    group, rep, rows, dim = x.shape
    return torch.bmm(x.reshape(group, rep * rows, dim), y.transpose(1, 2)).view(group * rep, rows, y.shape[1])


def _by_error(scores: torch.Tensor, error: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """scores fp32 [h, r, Mk] by mass, made those by error in place; error of the same shape, hidden bool [Mk]."""
    none = (error < LEAST_ERROR) & ~scores.isnan()
    scores += error.clamp_(max=MAX_SCORE).log_()
    return scores.clamp_(LEAST_SCORE, MAX_SCORE).masked_fill_(none, NO_ERROR).masked_fill_(hidden, float("-inf"))


def select(
    s: Selection,
    q_mean: torch.Tensor,
    k_mean: torch.Tensor,
    n_keys: torch.Tensor,
    out_counts: torch.Tensor,
    out_indices: torch.Tensor,
    seconds: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fill out_counts int32 [B, H, Mq] and out_indices int32 [B, H, Mq, W]; arguments as of the op, checked.

    q_mean [B, H, Mq, D], k_mean [B, Hkv, Mk, D] and n_keys int32 [B or 1, Mk] come from `pool_blocks`. seconds: for
    rank "error" fp32 mean squares of q_mean's shape and variances of k_mean's. Memory beyond the outputs: fp32
    copies of the means of one sample, and CHUNK_BYTES a worker (at least one row).
    """
    plan = (*in_range(s.kv_counts, s.kv_indices, k_mean.shape[2]), s.kv_forced, s.kv_near)
    batch, heads, n_q, dim = q_mean.shape
    kv_heads, n_kv = k_mean.shape[1:3]
    rep, width = heads // kv_heads, s.kv_indices.shape[-1]
    row_bytes = (4 if seconds is None else 12) * n_kv + BYTES_PER_CANDIDATE * width
    step_r = max(1, min(n_q, CHUNK_BYTES // (rep * row_bytes)))
    step_h = max(1, CHUNK_BYTES // (rep * row_bytes * step_r))

    def sample(b: int) -> list[Task]:
        q = q_mean[b].float().view(kv_heads, rep, n_q, dim)
        k = k_mean[b].float()
        # What overflowed is finite, so that 0 times it is 0.
        second = None if seconds is None else [x[b].clamp(max=MAX_SCORE) for x in seconds]
        bias = n_keys[b if n_keys.shape[0] > 1 else 0].log()
        own = s.thresholds[b if s.thresholds.shape[0] > 1 else 0]
        b_plan = b if s.kv_counts.shape[0] > 1 else 0

        def chunk(g: int, r: int) -> Task:
            kv, rows = slice(g, g + step_h), slice(r, r + step_r)
            of = slice(g * rep, (g + step_h) * rep)
            planned = of if s.kv_counts.shape[1] > 1 else slice(0, 1)

            def task(_: Buffers) -> None:
                scores = _pairs(q[kv, :, rows], k[kv]).mul_(s.factor).add_(bias)
                if second is not None:
                    squares = second[0].view(kv_heads, rep, n_q, dim)
                    scores = _by_error(scores, _pairs(squares[kv, :, rows], second[1][kv]), bias.isneginf())
                lines = (x[b_plan, planned, rows] for x in plan)
                out_counts[b, of, rows], out_indices[b, of, rows] = _rows(scores, own, s.criterion, *lines)

            return task

        return [chunk(g, r) for g in range(0, kv_heads, step_h) for r in range(0, n_q, step_r)]

    buffers = [Buffers() for _ in range(workers.count())]
    with torch.autocast("cpu", enabled=False):
        for b in range(batch):
            workers.run(sample(b), buffers)
