"""Compile a kernel for an architecture without a GPU: PTX, and what ptxas says of it; for AMD what the assembler says.

For the plugins of TensorRT, the tests, the tile model and whoever looks at PTX. The package imports it nowhere else.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from dynamicrad_compile.errors import ExportError

from .attention_gluon import CONSUMERS, REGISTERS
from .attention_triton import MEANS_TILE, _block_sparse_forward
from .tiles import Architecture, Tile

POINTERS = {"counts": "*i32", "indices": "*i32", "order": "*i32", "places": "*i32", "key_mask": "*i1", "lse": "*fp32"}
POINTERS |= dict.fromkeys(("q_scale", "k_scale", "mean_scale"), "*fp32")
POINTERS |= {"n_valid": "*i32", "weight": "*fp32", "kept": "*i32", "work": "*i32"}
WAVE = {"gfx942": 64, "gfx1100": 32}
"""Threads of a wave of AMD GPUs."""


@dataclass(frozen=True)
class Build:
    """A compiled kernel. What ptxas says of it is found out when it is asked for."""

    name: str
    target: str  # "sm_90a"
    ptx: str
    shared: int  # bytes of a block
    metadata: Any  # Triton's
    cubin: bytes = b""

    @cached_property
    def log(self) -> str:
        """What ptxas prints. Raises ExportError if it rejects the kernel."""
        arch = int(re.sub(r"\D", "", self.target))
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={self.target}", "-o", os.devnull, "-"]
        done = subprocess.run(command, input=self.ptx, capture_output=True, text=True)
        if done.returncode:
            raise ExportError(f"ptxas rejects the kernel for {self.target}: {done.stderr.strip()}")
        return done.stderr

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        found = re.search(r"Used (\d+) registers", self.log)
        assert found is not None, self.log
        return int(found[1])

    @property
    def spilled(self) -> int:
        """Bytes of a thread, stored and loaded."""
        return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", self.log)))

    @cached_property
    def sass(self) -> str:
        """The machine code, disassembled."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [str(Path(get_ptxas(90).path).with_name("nvdisasm")), "-c", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @property
    def instructions(self) -> dict[str, int]:
        """Numbers in the PTX of those that say how it works."""
        texts = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "cp_async": "cp.async.c", "tma": "cp.async.bulk.tensor"}
        return {name: self.ptx.count(text) for name, text in texts.items()}

    def __str__(self) -> str:
        shown = ", ".join(f"{n} {name}" for name, n in self.instructions.items() if n)
        return f"{self.registers} registers, {self.spilled} B spilled, {self.shared >> 10} KiB shared, {shown}"


@dataclass(frozen=True)
class AmdBuild:
    """A kernel compiled for an AMD GPU."""

    name: str
    target: str  # "gfx942"
    assembly: str
    shared: int  # bytes of LDS of a block

    def _count(self, what: str) -> int:
        found = re.search(rf"\.{what}:\s+(\d+)", self.assembly)
        return int(found[1]) if found else 0

    @property
    def registers(self) -> int:
        """Vector registers of a thread, accumulation registers included."""
        return self._count("vgpr_count")

    @property
    def spilled(self) -> int:
        """Bytes of a thread in memory."""
        return self._count("private_segment_fixed_size")

    @property
    def instructions(self) -> dict[str, int]:
        """Matrix instructions of CDNA and of RDNA."""
        return {name: self.assembly.count(f"v_{name}_") for name in ("mfma", "wmma")}

    def __str__(self) -> str:
        shown = ", ".join(f"{n} {name}" for name, n in self.instructions.items() if n)
        return f"{self.registers} registers, {self.spilled} B spilled, {self.shared >> 10} KiB LDS, {shown}"


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    arch: Architecture,
    options: Mapping[str, Any],
    language: Any = ASTSource,
) -> Any:
    """Compile a kernel for sm_ARCH (a Build) or for an AMD GPU (an AmdBuild), without a device; some seconds.

    types: type of each argument that is not in `constants`. aligned: arguments that divide by 16, as at run time;
    without this hint loads would be scalar. options: of the compilation, such as num_warps and num_stages. language:
    what its source is, Triton or Gluon.
    """
    names = kernel.arg_names
    if isinstance(arch, str):
        constants = {name: "ieee" if name == "PRECISION" else value for name, value in constants.items()}
    source = language(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"enable_fp_fusion": True, **options}
    if isinstance(arch, str):
        compiled = triton.compile(source, target=GPUTarget("hip", arch, WAVE[arch]), options=options)
        return AmdBuild(compiled.metadata.name, arch, compiled.asm["amdgcn"], compiled.metadata.shared)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    return Build(
        compiled.metadata.name, target[1], ptx, compiled.metadata.shared, compiled.metadata, compiled.asm["cubin"]
    )


def options_of(tile: Tile) -> dict[str, int]:
    """What a tile says of the launch."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def forward_constants(dtype: str, dim: int, tile: Tile, block_q: int, block_kv: int) -> dict[str, Any]:
    """The constants of the forward kernel that follow from dtype ("bf16", "fp16" or "fp32"), head_dim and blocks."""
    return {
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_Q": block_q,
        "BLOCK_KV": block_kv,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_J": min(MEANS_TILE, tile.block_n),
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
    }


def build_forward(
    arch: Architecture,
    dtype: str,
    dim: int,
    tile: Tile,
    *,
    masked: bool = False,
    compensate: bool = False,
    qk_int8: bool = False,
    gather: bool = False,
    block: int = 128,
) -> Any:
    """Compile the forward kernel for blocks of `block` tokens; dtype "bf16", "fp16" or "fp32".

    masked: with a ragged tail and a key mask. compensate: with mean keys. qk_int8: with int8 queries and keys.
    gather: with a token order. Raises ExportError for int8 and a Gluon kernel, and for an order and another than the
    plain kernel.
    """
    if gather and tile.kernel != "triton":
        raise ExportError(f"the kernel {tile.kernel} knows no token order; the plain one does.")
    if isinstance(arch, str) and tile.kernel != "triton":
        raise ExportError(f"the kernel {tile.kernel} is NVIDIA's; {arch} has the plain one.")
    if tile.kernel in CONSUMERS and isinstance(arch, int):
        if qk_int8:
            raise ExportError(f"the kernel {tile.kernel} has no int8 scores; the others have.")
        return _build_gluon(arch, dtype, dim, tile, masked, compensate, block)
    constants = forward_constants(dtype, dim, tile, block, block) | {
        "RAGGED": masked,
        "HAS_MASK": masked,
        "COMPENSATE": compensate,
        "ORDERED": True,
        "SPLITS": 1,
        "GATHER": gather,
        "TMA": tile.kernel == "tma",
        "QK8": qk_int8,
        "WIDEN": False,
        # What the launcher specialises because it is 1.
        "KV_GROUP": 1,
        "stride_cm": 1,
    }
    operands = dict.fromkeys(("q", "k", "v", "mean_k", "mean_v", "out"), f"*{dtype}")
    if qk_int8:
        operands |= dict.fromkeys(("q", "k", "mean_k"), "*i8")
    if tile.kernel == "tma":
        shape = f"[1, 1, {tile.block_n}, {constants['BLOCK_D']}]"
        operands |= {x: f"tensordesc<{operands[x][1:]}{shape}>" for x in "kv"}
    types = POINTERS | operands | {"scale": "fp32"}
    names = _block_sparse_forward.arg_names
    types = {name: types.get(name, "i32") for name in names}
    # As at run time: pointers and the strides of q, k, v divide by 16.
    aligned = [n for n in names if types[n].startswith("*") or re.match("stride_[qkv]", n)]
    return build(_block_sparse_forward, types, constants, aligned, arch, options_of(tile))


def _build_gluon(arch: int, dtype: str, dim: int, tile: Tile, masked: bool, compensate: bool, block: int) -> Build:
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    from .attention_gluon_kernels import _block_sparse_forward_gluon

    consumers = CONSUMERS[tile.kernel]
    constants = forward_constants(dtype, dim, tile, block, block) | {
        "RAGGED": masked,
        "HAS_MASK": masked,
        "COMPENSATE": compensate,
        "CONSUMERS": consumers,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps // consumers,
    }
    names = _block_sparse_forward_gluon.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    layout = NVMMASharedLayout(128, 16, rank=4)
    rows = dict.fromkeys(("k", "v", "mean_k", "mean_v"), tile.block_n) | {"q": tile.block_m // consumers}
    operands = {name: f"tensordesc<{dtype}[1,1,{n},{constants['BLOCK_D']}],{layout!r}>" for name, n in rows.items()}
    types = {n: (POINTERS | operands | {"out": f"*{dtype}", "scale": "fp32"}).get(n, "i32") for n in names}
    aligned = [n for n in names if types[n].startswith("*")]
    options = {"num_warps": constants["num_warps"], "maxnreg": REGISTERS}
    return build(_block_sparse_forward_gluon, types, constants, aligned, arch, options, GluonASTSource)
