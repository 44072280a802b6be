"""Token orders: what has to be done so that a block of consecutive tokens is a box of the video.

In raster order a block is a strip of one frame. Here a video is cut into slabs of frames, and these into strips of
rows, each cut as evenly as the grid allows. A strip is walked column by column: along the width, and in each column
row by row, frame by frame. So `block_size` tokens in this order, wherever they begin, are a box of

    frames of the slab x rows of the strip x whatever width is left of block_size

give or take a part of a column. Where the width ends the walk turns round in the next strip, so blocks that straddle
strips are still in one piece. No token is padded and no block but the last is partial, whatever the grid: text in front
of the video only moves where blocks begin. Text keeps its place at the ends.

Padding each box to a whole block would instead waste what the grid leaves: 15 % of frames of 30 x 52 in boxes of
4 x 8 x 8.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

Box = tuple[int, int, int]
"""(frames, height, width) of a block in latent tokens."""


@functools.lru_cache(maxsize=64)
def video_order(grid: tuple[int, int, int], box: Box) -> np.ndarray:
    """int64 [frames * height * width]: the token, in raster order, of each place; read-only."""
    frames, height, width = grid
    slab, strip = _parts(frames, box[0]), _parts(height, box[1])
    t, y, x = np.meshgrid(*(np.arange(n, dtype=np.int64) for n in grid), indexing="ij")
    strips = int(strip[-1]) + 1
    walked = slab[t] * strips + np.where(slab[t] % 2, strips - 1 - strip[y], strip[y])
    along = np.where(walked % 2, width - 1 - x, x)
    place = ((walked * width + along) * height + y) * frames + t
    order: np.ndarray = np.argsort(place.ravel(), kind="stable")
    order.setflags(write=False)
    return order


def _parts(length: int, size: int) -> np.ndarray:
    """int64 [length]: which part each of `length` places is in; parts are near `size` and differ by one at most."""
    number = max(1, (2 * length + size) // (2 * size))
    return np.arange(length, dtype=np.int64) * number // length


def inverse(order: torch.Tensor) -> torch.Tensor:
    """int64 [..., S]: the place of each token, of orders int64 [..., S] that say the token of each place."""
    places = torch.arange(order.shape[-1], dtype=torch.int64, device=order.device)
    return torch.zeros_like(order).scatter(-1, order, places.expand_as(order))


def reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, H, S, D] in an order int64 [1 or B, S]."""
    if order.shape[0] == 1:
        return x.index_select(2, order.squeeze(0))
    return x.gather(2, order.unsqueeze(1).unsqueeze(-1).expand(x.shape))


class _Reorder(torch.autograd.Function):
    """`reordered`, whose gradient is in the inverse order: no scattered additions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        return reordered(x, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order, back = ctx.saved_tensors
        return reorder(gradients[0], back, order), None, None


def reorder(x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """`reordered`, differentiable; back is the inverse of the order."""
    result: torch.Tensor = _Reorder.apply(x, order, back)
    return result


def reordered_keys(mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A key mask, bool [B or 1, S], in an order int64 [1 or B, S]."""
    if order.shape[0] == 1:
        return mask.index_select(1, order.squeeze(0))
    return mask.expand(order.shape[0], -1).gather(1, order)
