"""Tile sizes of the Triton backward kernels by architecture, dtype and head_dim.

As in `tiles`: a tile is `block_m` queries and `block_n` keys, both divide the plan's blocks. The entries of half
precision and of fp32 up to head_dim 64 were compiled ahead of time for sm_80 and sm_90 without a spill, within the
least shared memory of the architectures that share them. fp32 spills 12 to 400 bytes above that: TF32x3 keeps each
operand twice. None was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from dynamicrad_compile.errors import PlanError

from .tiles import Tile, _largest_power_of_two, architecture


class BackwardTiles(NamedTuple):
    """Tiles of the three kernels."""

    dq: Tile
    dk_dv: Tile
    dmeans: Tile  # its block_n counts mean keys


# Largest head_dim the entry serves -> tiles. "half" is fp16 and bf16, "float" is fp32.
BACKWARD_TILES: dict[int, dict[str, dict[int, BackwardTiles]]] = {
    80: {
        "half": {
            64: BackwardTiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
            128: BackwardTiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
            256: BackwardTiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
        },
        "float": {
            64: BackwardTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
            128: BackwardTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
            256: BackwardTiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        },
    },
    90: {
        "half": {
            64: BackwardTiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
            128: BackwardTiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
            256: BackwardTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
        },
        "float": {
            64: BackwardTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
            128: BackwardTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
            256: BackwardTiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        },
    },
}
BACKWARD_TILES[86] = BACKWARD_TILES[89] = BACKWARD_TILES[120] = BACKWARD_TILES[80]
BACKWARD_TILES[100] = BACKWARD_TILES[90]


def _cut(tile: Tile, block_q: int, block_kv: int) -> Tile:
    """The tile made small enough to divide the plan's blocks."""
    block_m = min(tile.block_m, _largest_power_of_two(block_q))
    block_n = min(tile.block_n, _largest_power_of_two(block_kv))
    whole = (block_m, block_n) == (tile.block_m, tile.block_n)
    return Tile(block_m, block_n, tile.num_warps if whole else min(tile.num_warps, 4), tile.num_stages)


def choose_backward_tiles(
    capability: tuple[int, int], half: bool, head_dim: int, block_q: int, block_kv: int
) -> BackwardTiles:
    """Tiles for a device and a plan: the table's entries, cut so that they divide the plan's blocks.

    Raises PlanError for a device older than 8.0, a head_dim above 256, or blocks that are not multiples of 16.
    """
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if block % 16 or not 16 <= block <= 256:
            raise PlanError(f"{name} must be a multiple of 16 up to 256 on CUDA, got {block}.")
    entries = BACKWARD_TILES[architecture(capability)]["half" if half else "float"]
    limit = min((size for size in entries if size >= head_dim), default=None)
    if limit is None:
        raise PlanError(f"head_dim must be at most {max(entries)}, got {head_dim}.")
    return BackwardTiles(*(_cut(tile, block_q, block_kv) for tile in entries[limit]))
