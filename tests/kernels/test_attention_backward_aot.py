"""The Triton backward kernels compile ahead of time, without a GPU, and no tile tested spills or overflows.

`pytest -s` prints registers, spilled bytes, shared memory and the number of wgmma instructions of each build.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from support.builds import build_backward  # noqa: E402

from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, choose_backward_tiles, choose_tile  # noqa: E402

CASES = [
    (arch, *case)
    for arch in (80, 90)
    for case in (
        ("dq", "bf16", 64, True),
        ("dq", "bf16", 128, False),
        ("dq", "bf16", 128, True),
        ("dk_dv", "bf16", 64, True),
        ("dk_dv", "bf16", 128, False),
        ("dk_dv", "bf16", 128, True),
        ("dk_dv", "fp32", 64, True),
        ("dmeans", "bf16", 64, True),
        ("dmeans", "bf16", 128, True),
    )
]


@pytest.mark.parametrize(
    ("arch", "kernel", "dtype", "dim", "full"),
    CASES,
    ids=[f"sm_{arch}-{kernel}-{dtype}-{dim}-{'full' if full else 'plain'}" for arch, kernel, dtype, dim, full in CASES],
)
def test_tile_compiles_without_spills(arch: int, kernel: str, dtype: str, dim: int, full: bool):
    tile = getattr(choose_backward_tiles(divmod(arch, 10), dtype != "fp32", dim, 128, 128), kernel)
    built = build_backward(kernel, arch, dtype, dim, tile, full)
    print(f"\nsm_{arch} {kernel} {dtype} head_dim {dim} {'full' if full else 'plain'} {tile} {built}")
    assert built.spilled == 0
    # sm_86, sm_89 and sm_120 share the entries of sm_80 and have the least.
    assert built.shared <= SHARED_MEMORY[86 if arch == 80 else arch]
    if arch == 90 and dtype != "fp32":
        assert built.instructions["wgmma"] > 0


@pytest.mark.parametrize("kernel", ["dq", "dk_dv"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_the_copy_engine_compiles_without_spills(kernel: str, dim: int, full: bool):
    tile = choose_tile((9, 0), True, dim, 128, 128, kernel, "tma")
    built = build_backward(kernel, 90, "bf16", dim, tile, full)
    print(f"\nsm_90 {kernel} bf16 head_dim {dim} {'full' if full else 'plain'} {tile} {built}")
    assert built.spilled == 0
    assert built.shared <= SHARED_MEMORY[90]
    assert built.instructions["wgmma"] > 0
    # Each of the two operands of the loop, for each stage; `_dk_dv` still loads a number for each row.
    assert built.instructions["tma"] == 2 * tile.num_stages
    if kernel == "dq" and not full:
        assert built.instructions["cp_async"] == 0
