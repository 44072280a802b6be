"""The Triton kernel compiles ahead of time, without a GPU, and no tile of the table spills or overflows.

`pytest -s` prints registers, spilled bytes, shared memory and the number of wgmma instructions of each build.
"""

from __future__ import annotations

import re
import subprocess

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, Tile, choose_tile  # noqa: E402
from dynamicrad_compile.kernels.triton_forward import MEANS_TILE, _block_sparse_forward  # noqa: E402
from dynamicrad_compile.kernels.triton_pooling import _pool_blocks  # noqa: E402

POINTERS = {"counts": "*i32", "indices": "*i32", "key_mask": "*i1", "lse": "*fp32"}
POINTERS |= {"n_valid": "*i32", "weight": "*fp32", "kept": "*i32"}


def build(arch: int, dtype: str, dim: int, tile: Tile, masked: bool, compensate: bool) -> dict[str, int]:
    """Compile for `arch` with 128 x 128 blocks; `masked` adds a ragged tail and a key mask."""
    constants = {
        "D": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "BLOCK_Q": 128,
        "BLOCK_KV": 128,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_J": min(MEANS_TILE, tile.block_n),
        "RAGGED": masked,
        "HAS_MASK": masked,
        "COMPENSATE": compensate,
        "WIDEN": False,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        # What the launcher specialises because it is 1.
        "KV_GROUP": 1,
        "stride_cm": 1,
    }
    names = _block_sparse_forward.arg_names
    pointers = POINTERS | dict.fromkeys(("q", "k", "v", "mean_k", "mean_v", "out"), f"*{dtype}")
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "fp32" if name == "scale" else "i32")
        for name in names
    }
    # As at run time: pointers and the strides of q, k, v divide by 16, or loads would be scalar.
    aligned = [n for n in names if n in pointers or re.match("stride_[qkv]", n)]
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return measure(_block_sparse_forward, signature, constants, aligned, arch, options)


def measure(fn, signature: dict, constants: dict, aligned: list[str], arch: int, options: dict) -> dict[str, int]:
    """Compile a kernel; `aligned` arguments divide by 16."""
    names = fn.arg_names
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)[1]
    ptxas = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", "-o", "/dev/null", "-"]
    log = subprocess.run(ptxas, input=ptx, capture_output=True, text=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "cp_async": ptx.count("cp.async.c"),
    }


CASES = [
    (arch, dtype, dim, masked, means)
    for arch in (80, 90, 120)
    for dtype, dim, masked, means in (
        ("bf16", 64, False, False),
        ("bf16", 64, True, False),
        ("bf16", 64, True, True),
        ("bf16", 128, False, False),
        ("bf16", 128, False, True),
        ("bf16", 128, True, False),
        ("bf16", 128, True, True),
        ("fp16", 128, False, False),
        ("fp32", 64, True, False),
        ("fp32", 128, True, False),
        ("fp32", 128, True, True),
    )
]


def name_of(arch: int, dtype: str, dim: int, masked: bool, means: bool) -> str:
    return f"sm_{arch}-{dtype}-{dim}-{'masked' if masked else 'plain'}{'-means' if means else ''}"


@pytest.mark.parametrize(("arch", "dtype", "dim", "masked", "means"), CASES, ids=[name_of(*case) for case in CASES])
def test_tile_compiles_without_spills(arch: int, dtype: str, dim: int, masked: bool, means: bool):
    tile = choose_tile(divmod(arch, 10), dtype != "fp32", dim, 128, 128)
    built = build(arch, dtype, dim, tile, masked, means)
    print(f"\n{name_of(arch, dtype, dim, masked, means)} {tile} {built}")
    assert built["spilled"] == 0
    assert built["shared"] <= SHARED_MEMORY[arch]
    assert built["cp_async"] > 0, "the software pipeline is gone"
    if arch == 90 and dtype != "fp32":  # the fp32 tile is too small for wgmma
        assert built["wgmma"] > 0


@pytest.mark.parametrize("dim", [64, 256])
def test_pooling_compiles_without_spills(dim: int):
    constants = {"D": dim, "BLOCK_D": dim, "BLOCK": 128, "BLOCK_S": 32, "HAS_MASK": True, "HAS_WANTED": True}
    pointers = {"x": "*bf16", "counts": "*i32", "mask": "*i1", "wanted": "*i1", "mean": "*bf16"}
    names = _pool_blocks.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = [n for n in names if n in pointers or n.startswith("stride_x")]
    built = measure(_pool_blocks, signature, constants, aligned, 80, {"num_warps": 4})
    assert built["spilled"] == 0
