"""Tile sizes of the Triton kernels by architecture, dtype and head_dim.

A query tile is `block_m` queries, a key tile `block_n` keys; both divide the plan's blocks. The entries were
compiled ahead of time for their architecture with every mask: none spills, all fit the shared memory. Which of
several such tiles is fastest was not measured; the half precision entries follow PyTorch's FlexAttention.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamicrad_compile.errors import PlanError

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one block may use, in bytes, by architecture (CUDA programming guide, table of limits)."""


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel launch: queries, keys, warps, software pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if not 16 <= size <= 256 or size & (size - 1):
                raise PlanError(f"{name} must be a power of two from 16 to 256, got {size}.")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise PlanError(f"num_warps must be 1, 2, 4, 8 or 16, got {self.num_warps}.")
        if not 1 <= self.num_stages <= 8:
            raise PlanError(f"num_stages must be 1 to 8, got {self.num_stages}.")


# Largest head_dim the entry serves -> tile. "half" is fp16 and bf16, "float" is fp32.
TILES: dict[int, dict[str, dict[int, Tile]]] = {
    80: {
        "half": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
        "float": {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    },
    86: {
        "half": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "float": {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    },
    90: {
        "half": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
        "float": {64: Tile(64, 32, 4, 3), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    },
    100: {
        "half": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
        "float": {64: Tile(64, 32, 4, 3), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    },
}
TILES[89] = TILES[120] = TILES[86]


def architecture(capability: tuple[int, int]) -> int:
    """Architecture whose entries serve a compute capability: the newest one that is not newer than it."""
    number = 10 * capability[0] + capability[1]
    known = [arch for arch in TILES if arch <= number]
    if not known:
        raise PlanError(f"the CUDA kernels need compute capability 8.0 or newer, got {capability[0]}.{capability[1]}.")
    return max(known)


def _largest_power_of_two(n: int) -> int:
    """Largest power of two that divides n."""
    return n & -n


def choose_tile(capability: tuple[int, int], half: bool, head_dim: int, block_q: int, block_kv: int) -> Tile:
    """Tile for a device and a plan: the table's entry, cut so that it divides the plan's blocks.

    Raises PlanError for a device older than 8.0, a head_dim above 256, or blocks that are not multiples of 16.
    """
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if block % 16 or not 16 <= block <= 256:
            raise PlanError(f"{name} must be a multiple of 16 up to 256 on CUDA, got {block}.")
    entries = TILES[architecture(capability)]["half" if half else "float"]
    limit = min((size for size in entries if size >= head_dim), default=None)
    if limit is None:
        raise PlanError(f"head_dim must be at most {max(entries)}, got {head_dim}.")
    tile = entries[limit]
    block_m = min(tile.block_m, _largest_power_of_two(block_q))
    block_n = min(tile.block_n, _largest_power_of_two(block_kv))
    warps = tile.num_warps if block_m == tile.block_m else min(tile.num_warps, 4)
    return Tile(block_m, block_n, warps, tile.num_stages)
