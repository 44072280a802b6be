"""Tile sizes of the Triton kernels by architecture, dtype and head_dim: the table `tiles.toml`, and its reader.

A query tile is `block_m` queries, a key tile `block_n` keys; both divide the plan's blocks. No tile of the table spills
when compiled ahead of time for its architecture with every mask, but for fp32 above head_dim 64, backwards (12 to 400
bytes) and `block_mass` (about 600), because TF32x3 keeps each operand twice, and for gfx1100, of which the table says
how much.
`benchmarks/kernel_model.py` shows what a choice implies.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.files import tomllib

if TYPE_CHECKING:
    from .chip import Chip

Architecture: TypeAlias = int | str
"""10 times a compute capability, or AMD's name."""
SHARED_MEMORY: dict[Architecture, int] = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_MEMORY |= {120: 99 << 10, "gfx942": 64 << 10, "gfx1100": 64 << 10}
"""Shared memory (LDS) that one block may use, in bytes, by architecture (CUDA programming guide; AMD's ISA guides)."""
AMD = {"gfx9": "gfx942", "gfx11": "gfx1100", "gfx12": "gfx1100"}
"""Architecture whose entries serve other AMD GPUs, by how their names begin. None of these kernels was ever run."""
KERNELS = ("forward", "dq", "dk_dv", "dmeans")
VARIANTS = {"forward": ("tma", "gluon", "gluon_pingpong"), "dq": ("tma",), "dk_dv": ("tma",)}
"""Other forms of a kernel than the plain one. They read through the copy engine; those of Gluon are for sm_90 alone.

An entry KERNEL_VARIANT of the table is a variant's tile; it runs where the section's `use` names it.
"""
CHOICE = "DYNAMICRAD_KERNEL"
"""Environment variable: "triton" or a variant that runs instead of what the table uses, where a tensor allows it."""
DTYPES = ("half", "float")
TABLE = Path(__file__).with_name("tiles.toml")


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel launch: queries, keys, warps, software pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    kernel: str = "triton"  # or one of VARIANTS
    source: str = ""  # how it was chosen

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if not isinstance(size, int) or not 16 <= size <= 256 or size & (size - 1):
                raise PlanError(f"{name} must be a power of two from 16 to 256, got {size}.")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise PlanError(f"num_warps must be 1, 2, 4, 8 or 16, got {self.num_warps}.")
        if not isinstance(self.num_stages, int) or not 1 <= self.num_stages <= 8:
            raise PlanError(f"num_stages must be 1 to 8, got {self.num_stages}.")
        if self.kernel != "triton" and self.kernel not in VARIANTS["forward"]:
            raise PlanError(f"kernel must be triton, {', '.join(VARIANTS['forward'])}, got {self.kernel!r}.")


class BackwardTiles(NamedTuple):
    """Tiles of the three kernels of the backward."""

    dq: Tile
    dk_dv: Tile
    dmeans: Tile  # its block_n counts mean keys


@dataclass
class Section:
    """The tiles of a dtype and head_dim of an architecture."""

    tiles: dict[str, Tile]  # by KERNEL or KERNEL_VARIANT
    use: tuple[str, ...] = ()  # the variants that run instead of the plain kernels


# architecture -> dtype -> largest head_dim -> section
Table = dict[Architecture, dict[str, dict[int, Section]]]


def read_table(path: Path = TABLE) -> Table:
    """The table of a TOML file. Raises PlanError that names file and entry where one is wrong."""
    table: Table = {}
    try:
        sections = tomllib.loads(path.read_text())
        for arch, dtypes in sections.items():
            for dtype, dims in dtypes.items():
                for dim, entries in dims.items():
                    place = f"[{arch}.{dtype}.{dim}]"
                    if not (re.fullmatch(r"sm_\d+|gfx[0-9a-f]+", arch) and dtype in DTYPES and dim.isdigit()):
                        raise PlanError(f"{place} is not [sm_NUMBER or gfxNUMBER.half or float.HEAD_DIM].")
                    key = int(arch[3:]) if arch.startswith("sm_") else arch
                    table.setdefault(key, {}).setdefault(dtype, {})[int(dim)] = _section(entries, place)
    except (OSError, AttributeError, tomllib.TOMLDecodeError, PlanError) as error:
        raise PlanError(f"{path.name}: {error}") from error
    return table


def _section(entries: dict[str, Any], place: str) -> Section:
    tiles = {name: _tile(entry, f"{place} {name}", name) for name, entry in entries.items() if name != "use"}
    use = entries.get("use", [])
    if not isinstance(use, list) or any(name not in tiles or name in KERNELS for name in use):
        variants = [name for name in tiles if name not in KERNELS]
        raise PlanError(f"{place} use must list variants of this section ({', '.join(variants) or 'none'}), got {use}.")
    return Section(tiles, tuple(use))


def _tile(entry: Any, place: str, name: str) -> Tile:
    variants = {f"{kernel}_{variant}": variant for kernel, known in VARIANTS.items() for variant in known}
    if name not in KERNELS and name not in variants:
        raise PlanError(f"{place}: the kernels are {', '.join((*KERNELS, *variants))}.")
    if not isinstance(entry, dict) or not isinstance(entry.get("tile"), list) or len(entry["tile"]) != 4:
        raise PlanError(f"{place} needs tile = [block_m, block_n, warps, stages].")
    if unknown := set(entry) - {"tile", "source"}:
        raise PlanError(f"{place}: unknown {', '.join(sorted(unknown))}; known are tile and source.")
    try:
        block_m, block_n, warps, stages = entry["tile"]
        return Tile(block_m, block_n, warps, stages, variants.get(name, "triton"), str(entry.get("source", "")))
    except PlanError as error:
        raise PlanError(f"{place}: {error}") from error


NOTHING = Section({})


@cache
def table() -> Table:
    """The shipped table."""
    return read_table()


def architecture(chip: Chip, dtype: str = "half", head_dim: int = 128, kernel: str = "forward") -> Architecture:
    """Architecture whose entry serves a chip: the newest with such an entry that is not newer, or AMD's of a kind."""
    if isinstance(chip, str):
        served = chip if chip in table() else next((AMD[name] for name in AMD if chip.startswith(name)), None)
        if served is None:
            raise PlanError(f"the kernels need an AMD GPU of {', '.join(AMD)}, got {chip}.")
        return served
    number = 10 * chip[0] + chip[1]
    # 12.x has the shared memory of 8.6, not that of 9.0 and 10.0.
    skipped = range(90, 120) if number >= 120 else ()
    known = [
        arch
        for arch, dtypes in table().items()
        if isinstance(arch, int)
        and arch <= number
        and arch not in skipped
        and kernel in dtypes.get(dtype, {}).get(head_dim, NOTHING).tiles
    ]
    if not known:
        raise PlanError(f"the CUDA kernels need compute capability 8.0 or newer, got {chip[0]}.{chip[1]}.")
    return max(known)


def _largest_power_of_two(n: int) -> int:
    """Largest power of two that divides n."""
    return n & -n


def asked_variant() -> str | None:
    """What the environment (CHOICE) asks for. Raises PlanError if that is no kernel."""
    asked = os.environ.get(CHOICE) or None
    if asked not in (None, "triton", *VARIANTS["forward"]):
        raise PlanError(f"{CHOICE} must be triton, {', '.join(VARIANTS['forward'])}, got {asked!r}.")
    return asked


def variant_in_use(chip: Chip, half: bool, head_dim: int, kernel: str = "forward") -> str | None:
    """The variant that is to run: that of the environment (CHOICE), else the table's; None for the plain kernel.

    Raises PlanError if the environment names none.
    """
    asked = asked_variant()
    if asked:
        return asked if asked in VARIANTS.get(kernel, ()) else None
    section = _entry(chip, half, head_dim, kernel)
    return next((variant for variant in VARIANTS.get(kernel, ()) if f"{kernel}_{variant}" in section.use), None)


def _entry(chip: Chip, half: bool, head_dim: int, kernel: str) -> Section:
    dtype = "half" if half else "float"
    sizes = {size for dtypes in table().values() for size in dtypes.get(dtype, {})}
    entry = min((size for size in sizes if size >= head_dim), default=None)
    if entry is None:
        raise PlanError(f"head_dim must be at most {max(sizes)}, got {head_dim}.")
    return table()[architecture(chip, dtype, entry, kernel)][dtype][entry]


def choose_tile(
    chip: Chip,
    half: bool,
    head_dim: int,
    block_q: int,
    block_kv: int,
    kernel: str = "forward",
    variant: str | None = None,
) -> Tile:
    """Tile of a kernel for a device and a plan: the table's entry, cut so that it divides the plan's blocks.

    variant: one of VARIANTS. The plain kernel's tile instead where there is no such entry, the device is none for it,
    or, with Gluon, the plan's blocks would cut its queries or leave fewer than 64 keys.
    Raises PlanError for a device older than 8.0, a head_dim above 256, or blocks that are not multiples of 16.
    """
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if block % 16 or not 16 <= block <= 256:
            raise PlanError(f"{name} must be a multiple of 16 up to 256 on CUDA, got {block}.")
    tiles = _entry(chip, half, head_dim, kernel).tiles
    if variant is not None and chip[0] == 9 and f"{kernel}_{variant}" in tiles:
        tile = tiles[f"{kernel}_{variant}"]
        if "gluon" not in variant or (block_q % tile.block_m == 0 and block_kv % 64 == 0):
            return _cut(tile, block_q, block_kv, kernel)
    return _cut(tiles[kernel], block_q, block_kv, kernel)


def _cut(tile: Tile, block_q: int, block_kv: int, kernel: str) -> Tile:
    block_m = min(tile.block_m, _largest_power_of_two(block_q))
    block_n = min(tile.block_n, _largest_power_of_two(block_kv))
    cut = block_m < tile.block_m or (kernel != "forward" and block_n < tile.block_n)
    warps = min(tile.num_warps, 4) if cut else tile.num_warps
    return replace(tile, block_m=block_m, block_n=block_n, num_warps=warps)


def choose_backward_tiles(
    chip: Chip, half: bool, head_dim: int, block_q: int, block_kv: int, variants: bool = True
) -> BackwardTiles:
    """`choose_tile` for the three kernels of the backward, of the variants in use; without `variants` all are plain."""

    def choose(kernel: str) -> Tile:
        variant = variant_in_use(chip, half, head_dim, kernel) if variants else None
        return choose_tile(chip, half, head_dim, block_q, block_kv, kernel, variant)

    return BackwardTiles(*map(choose, BackwardTiles._fields))
