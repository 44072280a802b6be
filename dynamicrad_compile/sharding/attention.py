"""Attention over sharded rows: every process attends over the whole sequence with its share of the heads.

Text is held by all. So a process's attention sees the layout that one process would see, and masks stay as they are:

    query, key, value : [B, H, rows | text, D] -> [B, H / n, S | text, D]
    output            : [B, H / n, S | text, D] -> [B, H, rows | text, D]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..errors import ShardError
from .exchange import Shards
from .plans import ShardPlan


class ShardedAttention(TorchFunctionMode):
    """Inside, `F.scaled_dot_product_attention` over the rows of this process is over those of all; counts its calls."""

    def __init__(self, shards: Shards, plan: ShardPlan) -> None:
        super().__init__()
        self.shards = shards
        self.plan = plan
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.unflatten:  # Dynamo 2.13 does not trace the method's super() inside a mode
            func = torch.unflatten
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return attention(self.shards, self.plan, *args, **(kwargs or {}))


def attention(
    shards: Shards,
    plan: ShardPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` of [B, H, rows | text, D]; masks are those of the whole sequence.

    Raises ShardError where the heads can't be shared out or the rows are not those of the plan.
    """
    _check(shards, plan, query, key)
    if attn_mask is not None:
        attn_mask = _mask(shards, plan, attn_mask)
    query, key, value = (_whole(shards, plan, x) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    video, text = _parted(plan, out, shards.size)
    video = shards.rows_for_heads(video)
    return video if text is None else _joined(plan, video, shards.gather_heads(text))


def _whole(shards: Shards, plan: ShardPlan, x: torch.Tensor) -> torch.Tensor:
    """[B, H, rows | text, D] -> [B, H / n, S | text, D]."""
    video, text = _parted(plan, x, shards.local)
    video = shards.heads_for_rows(video)
    return video if text is None else _joined(plan, video, shards.heads(text))


def _parted(plan: ShardPlan, x: torch.Tensor, video: int, dim: int = -2) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(video, text) of a dimension that has `video` rows of video."""
    if plan.text is None:
        return x, None
    text = x.shape[dim] - video
    if plan.text == "before":
        return x.narrow(dim, text, video), x.narrow(dim, 0, text)
    return x.narrow(dim, 0, video), x.narrow(dim, video, text)


def _joined(plan: ShardPlan, video: torch.Tensor, text: torch.Tensor, dim: int = -2) -> torch.Tensor:
    return torch.cat([text, video] if plan.text == "before" else [video, text], dim)


def _mask(shards: Shards, plan: ShardPlan, mask: torch.Tensor) -> torch.Tensor:
    """A mask [..., H or 1, rows or 1, columns or 1] for this process's heads and the whole sequence."""
    if mask.dim() > 2 and mask.shape[-3] != 1:
        mask = mask.chunk(shards.world, -3)[shards.rank]
    if not plan.local_mask:
        return mask
    keys = _parted(plan, mask, shards.local)[0].narrow(-2, 0, 1)  # what a video token sees
    video, text = _parted(plan, keys, shards.local, -1)
    video = video.narrow(-1, 0, 1).expand(*keys.shape[:-1], shards.size)
    return video if text is None else _joined(plan, video, text, -1)


def _check(shards: Shards, plan: ShardPlan, query: torch.Tensor, key: torch.Tensor) -> None:
    for x in (query, key):
        if x.shape[1] % shards.world:
            raise ShardError(f"{x.shape[1]} heads can't be shared out among {shards.world} processes")
    rows, expected = query.shape[-2], "at least" if plan.text else "exactly"
    fits = plan.text is not None or rows == shards.local
    if key.shape[-2] != rows or not fits:
        raise ShardError(
            f"an attention has {rows} queries and {key.shape[-2]} keys where this process has {shards.local} video "
            f"tokens: expected {expected} as many of both. The plan's `attention` or `text` is not the model's"
        )
