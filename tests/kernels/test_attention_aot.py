"""The Triton kernel compiles ahead of time, without a GPU, and no tile of the table spills or overflows.

`pytest -s` prints registers, spilled bytes, shared memory and the number of wgmma instructions of each build.
"""

from __future__ import annotations

import dataclasses

import pytest
from support.marks import slow

triton = pytest.importorskip("triton")

from dynamicrad_compile.kernels.ahead_of_time import build_forward  # noqa: E402
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, Tile, choose_tile  # noqa: E402

KINDS = (  # dtype, head_dim, masked, means
    ("bf16", 64, True, True),
    ("bf16", 128, True, True),
    ("fp32", 64, True, False),
    ("bf16", 64, False, False),
    ("bf16", 64, True, False),
    ("bf16", 128, False, False),
    ("bf16", 128, False, True),
    ("bf16", 128, True, False),
    ("fp16", 128, False, False),
    ("fp32", 128, True, False),
    ("fp32", 128, True, True),
)
# sm_89 has the entries of sm_86, as has sm_120 but for one of its own; sm_100 is compiled for its own.
CASES = [(90, *kind) for kind in KINDS]
CASES += [(arch, *kind) for arch in (80, 89, 100, 120) for kind in KINDS[:3]]
MORE = [(arch, *kind) for arch in (80, 120) for kind in KINDS[3:]]


def name_of(arch: int, dtype: str, dim: int, masked: bool, means: bool) -> str:
    return f"sm_{arch}-{dtype}-{dim}-{'masked' if masked else 'plain'}{'-means' if means else ''}"


def check(built, arch: int, half: bool, tma: bool = False) -> None:
    assert built.spilled == 0
    assert built.shared <= SHARED_MEMORY[arch]
    assert (built.instructions["tma"] if tma else built.instructions["cp_async"]) > 0, "the software pipeline is gone"
    if arch == 90 and half:
        assert built.instructions["wgmma"] > 0
    elif arch != 100:  # whose tensor cores have instructions of their own
        assert built.instructions["wgmma"] + built.instructions["mma"] > 0


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "masked", "means"),
    [*CASES, *(slow(*case) for case in MORE)],
    ids=[name_of(*case) for case in (*CASES, *MORE)],
)
def test_tile_compiles_without_spills(arch: int, dtype: str, dim: int, masked: bool, means: bool):
    tile = choose_tile(divmod(arch, 10), dtype != "fp32", dim, 128, 128)
    built = build_forward(arch, dtype, dim, tile, masked=masked, compensate=means)
    print(f"\n{name_of(arch, dtype, dim, masked, means)} {tile} {built}")
    check(built, arch, dtype != "fp32")


@pytest.mark.parametrize(
    ("dim", "tile"), [(64, Tile(128, 64, 4, 3)), (128, Tile(128, 128, 8, 2))], ids=["dim_64", "dim_128"]
)
def test_the_copy_engine_needs_fewer_registers(dim: int, tile: Tile):
    plain = build_forward(90, "bf16", dim, tile)
    tma = build_forward(90, "bf16", dim, dataclasses.replace(tile, kernel="tma"))
    check(tma, 90, True, tma=True)
    assert tma.instructions["cp_async"] == 0
    assert tma.registers < plain.registers


@pytest.mark.parametrize("arch", [80, 90])
def test_int8_scores_compile_without_spills(arch: int):
    built = build_forward(
        arch,
        "bf16",
        128,
        choose_tile(divmod(arch, 10), True, 128, 128, 128),
        masked=True,
        compensate=True,
        qk_int8=True,
    )
    check(built, arch, True)
    assert ".s8.s8" in built.ptx
