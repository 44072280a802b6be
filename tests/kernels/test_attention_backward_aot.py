"""The Triton backward kernels compile ahead of time, without a GPU, and no tile tested spills or overflows.

`pytest -s` prints registers, spilled bytes, shared memory and the number of wgmma instructions of each build.
"""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from dynamicrad_compile.kernels import ahead_of_time  # noqa: E402
from dynamicrad_compile.kernels.attention_backward_triton import MEANS_TILE  # noqa: E402
from dynamicrad_compile.kernels.attention_backward_triton_kernels import _dk_dv, _dq  # noqa: E402
from dynamicrad_compile.kernels.means_backward_triton import _dmeans  # noqa: E402
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, Tile, choose_backward_tiles, choose_tile  # noqa: E402

KERNELS = {"dq": _dq, "dk_dv": _dk_dv, "dmeans": _dmeans}
POINTERS = dict.fromkeys(("counts", "indices", "n_valid", "kept"), "*i32") | dict.fromkeys(
    ("lse2", "delta", "weight", "dmean_k", "dmean_v"), "*fp32"
)
OPERANDS = ("q", "k", "v", "grad_out", "mean_k", "mean_v", "dq", "dk", "dv")


def build(kernel: str, arch: int, dtype: str, dim: int, tile: Tile, full: bool) -> ahead_of_time.Build:
    """Compile with 128 x 128 blocks; `full` adds ragged tails, a key mask, compensation and shared key heads."""
    function = KERNELS[kernel]
    names = function.arg_names
    constants = {
        "D": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "BLOCK_Q": 128,
        "BLOCK_KV": 128,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_J": min(MEANS_TILE, tile.block_n),
        "RAGGED": full,
        "HAS_MASK": full,
        "COMPENSATE": full,
        "TMA": tile.kernel == "tma",
        "WIDEN": False,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        # What the launcher specialises because it is 1.
        "stride_cm": 1,
        **({} if full else {"KV_GROUP": 1}),
    }
    constants = {name: value for name, value in constants.items() if name in names}
    pointers = POINTERS | {"key_mask": "*i1"} | dict.fromkeys(OPERANDS, f"*{dtype}")
    types = pointers | {"scale": "fp32"}
    if tile.kernel == "tma":
        described, rows = {"dq": ("kv", tile.block_n), "dk_dv": (("q", "grad_out"), tile.block_m)}[kernel]
        types |= dict.fromkeys(described, f"tensordesc<{dtype}[1, 1, {rows}, {constants['BLOCK_D']}]>")
    signature = {name: types.get(name, "i32") for name in names}
    # As at run time: pointers and the strides of q, k, v, grad_out divide by 16, or loads would be scalar.
    aligned = [n for n in names if signature[n].startswith("*") or re.match("stride_[qkvg]", n)]
    return ahead_of_time.build(function, signature, constants, aligned, arch, ahead_of_time.options_of(tile))


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
    built = build(kernel, arch, dtype, dim, tile, full)
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
    built = build(kernel, 90, "bf16", dim, tile, full)
    print(f"\nsm_90 {kernel} bf16 head_dim {dim} {'full' if full else 'plain'} {tile} {built}")
    assert built.spilled == 0
    assert built.shared <= SHARED_MEMORY[90]
    assert built.instructions["wgmma"] > 0
    # Each of the two operands of the loop, for each stage; `_dk_dv` still loads a number for each row.
    assert built.instructions["tma"] == 2 * tile.num_stages
    if kernel == "dq" and not full:
        assert built.instructions["cp_async"] == 0
