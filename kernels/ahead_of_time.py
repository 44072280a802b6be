"""Compile the forward kernel for an architecture without a GPU: registers, spilled bytes, shared memory, PTX.

For the tests, the tile model and whoever looks at PTX. Nothing here is imported at run time.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from .attention_triton import MEANS_TILE, _block_sparse_forward
from .tiles import Tile

POINTERS = {"counts": "*i32", "indices": "*i32", "order": "*i32", "key_mask": "*i1", "lse": "*fp32"}
POINTERS |= dict.fromkeys(("q_scale", "k_scale", "mean_scale"), "*fp32")
POINTERS |= {"n_valid": "*i32", "weight": "*fp32", "kept": "*i32"}


@dataclass(frozen=True)
class Build:
    """What a compiled kernel needs and contains."""

    registers: int  # of a thread
    spilled: int  # bytes
    shared: int  # bytes of a block
    wgmma: int  # instructions in the PTX, as of the rest
    mma: int
    cp_async: int
    tma: int
    ptx: str

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("wgmma", "mma", "cp_async", "tma")}
        shown = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        return f"{self.registers} registers, {self.spilled} B spilled, {self.shared >> 10} KiB shared, {shown}"


def build(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: list[str], arch: int, tile: Tile
) -> Build:
    """Compile a kernel. signature: type of each argument that is not in `constants`; `aligned` ones divide by 16."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    ptxas = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", "-o", "/dev/null", "-"]
    log = subprocess.run(ptxas, input=ptx, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    return Build(
        registers=int(registers[1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        cp_async=ptx.count("cp.async.c"),
        tma=ptx.count("cp.async.bulk.tensor"),
        ptx=ptx,
    )


def build_forward(
    arch: int,
    dtype: str,
    dim: int,
    tile: Tile,
    *,
    masked: bool = False,
    compensate: bool = False,
    qk_int8: bool = False,
    block: int = 128,
) -> Build:
    """Compile the forward kernel for blocks of `block` tokens; dtype "bf16", "fp16" or "fp32".

    masked: with a ragged tail and a key mask. compensate: with mean keys. qk_int8: with int8 queries and keys.
    """
    block_d = max(16, triton.next_power_of_2(dim))
    constants = {
        "D": dim,
        "BLOCK_D": block_d,
        "BLOCK_Q": block,
        "BLOCK_KV": block,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_J": min(MEANS_TILE, tile.block_n),
        "RAGGED": masked,
        "HAS_MASK": masked,
        "COMPENSATE": compensate,
        "ORDERED": True,
        "SPLITS": 1,
        "TMA": tile.tma,
        "QK8": qk_int8,
        "WIDEN": False,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        # What the launcher specialises because it is 1.
        "KV_GROUP": 1,
        "stride_cm": 1,
    }
    operands = dict.fromkeys(("q", "k", "v", "mean_k", "mean_v", "out"), f"*{dtype}")
    if qk_int8:
        operands |= dict.fromkeys(("q", "k", "mean_k"), "*i8")
    if tile.tma:
        operands |= {x: f"tensordesc<{operands[x][1:]}[1, 1, {tile.block_n}, {block_d}]>" for x in "kv"}
    types = POINTERS | operands | {"scale": "fp32"}
    names = _block_sparse_forward.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    # As at run time: pointers and the strides of q, k, v divide by 16, or loads would be scalar.
    aligned = [n for n in names if signature[n].startswith("*") or re.match("stride_[qkv]", n)]
    return build(_block_sparse_forward, signature, constants, aligned, arch, tile)
