"""What the calls of a running graph skipped, added up on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from ..plans.cost import computed


def new_stats(device: torch.device) -> Tensor:
    """Sums over calls, fp64 [2]: share of dense attention that was computed, number of calls."""
    return torch.zeros(2, dtype=torch.float64, device=device)


def new_search_stats(heads: int, device: torch.device) -> Tensor:
    """Sums over searches, fp64 [1 + H]: their number, and the recall of each head, the mean over a batch."""
    return torch.zeros(1 + heads, dtype=torch.float64, device=device)


@has_side_effect
def record(
    stats: Tensor,
    kv_counts: Tensor,
    compensate: Tensor | None,
    kv_indices: Tensor,
    num_kv: int | None,
    block_kv: int,
    overhead: float = 0.0,
) -> None:
    """Add a call to `stats`; see `new_stats`.

    num_kv None: the width of the indices is the number of kv blocks. overhead: what covariances add where rows drop
    blocks; a dense row has none.
    """
    blocks = kv_indices.shape[-1] if num_kv is None else num_kv
    weights = None if compensate is None else compensate[:, None, None]
    share = computed(kv_counts, weights, blocks, block_kv)
    if overhead:
        share = share + overhead * (kv_counts < blocks).double().mean()
    stats.add_(torch.stack([share, torch.ones_like(share)]))
