"""Builds of the forward kernels for an architecture, without a GPU: whether they compile, registers, spills, memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, Tile

from .runner import Row, Unsupported, Values
from .tile_rows import facts_of, name_of
from .variants import PLAIN


def rows(arch: int, dim: int, tiles: Iterable[Tile]) -> Iterator[Row]:
    """One row for each tile at a head_dim, bf16."""
    for tile in tiles:
        facts = {"arch": arch, "head_dim": dim, **facts_of(tile)}
        name = f"build/{arch}/{dim}/{name_of(tile)}"
        yield Row(name, "builds", lambda t=tile: run_build(arch, dim, t), 3.0, facts)


def run_build(arch: int, dim: int, tile: Tile) -> Values:
    """What ptxas says of the kernel; one that needs more shared memory than there is has failed."""
    try:
        from dynamicrad_compile.kernels.ahead_of_time import build_forward
    except ImportError as error:
        raise Unsupported(f"no Triton: {error}") from error
    start = time.monotonic()
    built = build_forward(arch, "bf16", dim, tile)
    if "gluon" in tile.kernel and built.name == PLAIN:
        raise Unsupported("this checkout builds the plain kernel for it")
    limit = SHARED_MEMORY[max(known for known in SHARED_MEMORY if isinstance(known, int) and known <= arch)]
    if built.shared > limit:
        raise AssertionError(f"it needs {built.shared >> 10} KiB of shared memory, a block has {limit >> 10}")
    return {"registers": built.registers, "spilled": built.spilled, "shared": built.shared, "built": built.name,
            "summary": str(built), "build_s": round(time.monotonic() - start, 2)}  # fmt: skip
