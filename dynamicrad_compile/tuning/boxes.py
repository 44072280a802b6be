"""The shapes of blocks that a search tries: raster order, and boxes from a single frame to columns in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Shape = list[int] | str
"""[frames, height, width] of a box of latent tokens, or "raster"; as in a profile's table."""

MAX_FRAMES = 32


def shapes(grid: Sequence[int], block_size: int) -> list[Shape]:
    """ "raster", then boxes of `block_size` tokens in powers of two that fit the grid, those of the most frames last.

    For each number of frames the one box that is nearest to a square in the frame, its width at least its height.
    """
    found: list[Shape] = ["raster"]
    frames = 1
    while frames <= min(grid[0], block_size, MAX_FRAMES):
        area = block_size // frames
        height = 1 << (area.bit_length() - 1) // 2
        if height <= grid[1] and area // height <= grid[2]:
            found.append([frames, height, area // height])
        frames *= 2
    return found


def problem(shape: Any, block_size: int) -> str:
    """Why a block of `block_size` tokens can't have a shape; "" if it can."""
    if shape == "raster":
        return ""
    sizes = isinstance(shape, list) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)
    if not sizes:
        return f"a box is [frames, height, width] in latent tokens or 'raster', got {shape!r}"
    if math.prod(shape) == block_size:
        return ""
    return f"box {shape} holds {math.prod(shape)} tokens, expected those of a block, block_size = {block_size}"
