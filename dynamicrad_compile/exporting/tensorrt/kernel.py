"""The forward kernel as PTX for a TensorRT plugin: built for a given architecture, without a GPU.

TensorRT launches a plugin's kernel with the pointers of its inputs, then 32-bit integers, then the pointers of its
outputs, and all of its tensors are contiguous. `_plugin_forward` has its arguments in that order, works out the
strides, and is otherwise the kernel of `kernels.attention_triton_kernels`. Everything that TensorRT can't pass, above
all the scale, is a constant of the build.

Triton appends two scratch pointers to the parameters of every kernel. This one uses neither; TensorRT would not pass
them, so they are cut out.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import triton
import triton.language as tl

from ...errors import ExportError
from ...kernels.ahead_of_time import Build, build, forward_constants, options_of
from ...kernels.attention_triton import _block_sparse_forward
from ...kernels.tiles import SHARED_MEMORY, Tile, choose_tile
from .names import input_names

SIZES = ("q_len", "kv_len", "plans", "plan_heads", "width")
"""What the kernel is passed of the shapes of its inputs; with a mask or means also the batch of those."""

PTX_VERSION = {80: 80, 86: 80, 89: 80, 90: 80, 100: 86, 120: 87}
"""Oldest PTX ISA that knows the architecture, as major * 10 + minor; not below 8.0, what Triton's code needs."""

POINTERS = {"kv_counts": "*i32", "kv_indices": "*i32", "kv_mask": "*i32", "n_valid": "*i32", "weight": "*fp32"}
POINTERS |= {"kept": "*i32", "lse": "*fp32"}


@triton.jit
def _plugin_forward(
    q,  # [B, H, Sq, D]; every tensor is contiguous
    k,  # [B, Hkv, Sk, D]
    v,  # [B, Hkv, Sk, D]
    kv_counts,  # int32 [P, H', Mq]
    kv_indices,  # int32 [P, H', Mq, W]
    kv_mask,  # int32 [B'', Sk], not 0 where a key may be attended
    mean_k,  # [B, Hkv, Mk, D]
    mean_v,  # [B, Hkv, Mk, D]
    n_valid,  # int32 [B'', Mk]
    weight,  # fp32 [B or 1]
    kept,  # int32 [P, H', Mq, ceil(Mk / 32)]
    q_len,
    kv_len,
    plans,  # P: 1 or B
    plan_heads,  # H': 1 or H
    width,  # W
    masks,  # B'': 1 or B
    weights,
    out,  # [B, H, Sq, D]
    lse,  # fp32 [B, H, Sq]
    SCALE: tl.constexpr,
    H: tl.constexpr,
    KV_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPENSATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    H_KV: tl.constexpr = H // KV_GROUP
    stride_qh = q_len.to(tl.int64) * D
    stride_kh = kv_len.to(tl.int64) * D
    rows = tl.cdiv(q_len, BLOCK_Q)
    blocks = tl.cdiv(kv_len, BLOCK_KV)
    words = tl.cdiv(blocks, 32)
    # A plan, a mask or a weight that all samples or heads share has a stride of 0.
    plan_row = tl.where(plan_heads > 1, rows, 0)
    plan_rows = tl.where(plans > 1, plan_heads * rows, 0)
    mask_batch = 0
    count_batch = 0
    weight_batch = 0
    if HAS_MASK:
        mask_batch = tl.where(masks > 1, kv_len, 0)
        count_batch = tl.where(masks > 1, blocks, 0)
    if COMPENSATE:
        weight_batch = tl.where(weights > 1, 1, 0)
    _block_sparse_forward(
        q,
        k,
        v,
        lse,  # q_scale, k_scale, mean_scale, order, places: not read without QK8, ORDERED and GATHER
        lse,
        lse,
        kv_counts,
        kv_indices,
        kv_counts,
        kv_counts,
        kv_mask,
        mean_k,
        mean_v,
        n_valid,
        weight,
        kept,
        out,
        lse,
        SCALE,
        H,
        KV_GROUP,
        q_len,
        kv_len,
        width,
        H * stride_qh,
        stride_qh,
        D,
        H_KV * stride_kh,
        stride_kh,
        D,
        H_KV * stride_kh,
        stride_kh,
        D,
        plan_rows,
        plan_row,
        1,
        plan_rows * width,
        plan_row * width,
        width,
        mask_batch,
        count_batch,
        weight_batch,
        plan_rows * words,
        plan_row * words,
        words,
        D=D,
        BLOCK_D=BLOCK_D,
        BLOCK_Q=BLOCK_Q,
        BLOCK_KV=BLOCK_KV,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_J=BLOCK_J,
        RAGGED=RAGGED,
        HAS_MASK=HAS_MASK,
        COMPENSATE=COMPENSATE,
        ORDERED=False,
        SPLITS=1,
        GATHER=False,
        TMA=False,
        QK8=False,
        WIDEN=False,
        PRECISION=PRECISION,
    )


@dataclass(frozen=True)
class KernelConfig:
    """What one build of the kernel is for.

    dtype       "fp16", "bf16" or "fp32"
    ragged      kv_len may be no multiple of block_kv
    masked      there is a key mask
    compensate  dropped blocks count by their means
    """

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    block_q: int
    block_kv: int
    scale: float
    ragged: bool = True
    masked: bool = False
    compensate: bool = False

    def inputs(self) -> tuple[str, ...]:
        """Names of the input tensors, in the order of the kernel's arguments."""
        return input_names(self.masked, self.compensate)

    def sizes(self) -> tuple[str, ...]:
        """Names of the integers that the kernel is passed behind its inputs."""
        return SIZES + ("masks",) * self.masked + ("weights",) * self.compensate


@dataclass(frozen=True)
class KernelImage:
    """A kernel ready to be embedded: its PTX has as parameters inputs, sizes and outputs (out, lse), in this order.

    The grid is Mq * (block_q / block_m) * B * H, a block has `threads` threads and `built.shared` bytes of dynamic
    memory.
    """

    built: Build
    block_m: int
    threads: int


def tiles_of(capability: tuple[int, int], config: KernelConfig) -> tuple[Tile, Tile]:
    """The table's tile, and one that needs less shared memory; the second may be as slow as it likes.

    A kernel that needs more than 48 KiB has to be allowed to by whoever launches it, which TensorRT does not promise.
    """
    _number(capability)
    best = choose_tile(capability, config.dtype != "fp32", config.head_dim, config.block_q, config.block_kv)
    rows = 64 if config.head_dim <= 128 else 32
    small = replace(
        best, block_m=min(best.block_m, rows), block_n=min(best.block_n, 32), num_warps=min(best.num_warps, 4)
    )
    return best, replace(small, num_stages=1)


def _number(capability: tuple[int, int]) -> int:
    """89 for 8.9. Raises ExportError for an architecture that is too old."""
    number = 10 * capability[0] + capability[1]
    if number < min(arch for arch in SHARED_MEMORY if isinstance(arch, int)):
        raise ExportError(
            f"the attention kernel needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}. "
            "Use a newer GPU, or via='trtexec', whose models need no kernel of ours."
        )
    return number


@functools.lru_cache(maxsize=64)
def build_kernel(config: KernelConfig, capability: tuple[int, int], tile: Tile | None = None) -> KernelImage:
    """Compile the kernel for a compute capability, without a device; some seconds, cached.

    tile: the table's if None. Raises ExportError for an architecture without a table entry, and PlanError for blocks
    or a head_dim that the kernel can't take.
    """
    number = _number(capability)
    if tile is None:
        tile = tiles_of(capability, config)[0]
    constants = _constants(config, tile)
    names = _plugin_forward.arg_names
    given = (*config.inputs(), *config.sizes(), "out", "lse")
    constants |= {name: None for name in names if name not in constants and name not in given}
    typed = dict.fromkeys(("q", "k", "v", "mean_k", "mean_v", "out"), f"*{config.dtype}") | POINTERS
    types = {name: typed.get(name, "i32") for name in names}
    aligned = [name for name in given if name in typed]  # as TensorRT allocates them
    version = PTX_VERSION[max(n for n in PTX_VERSION if n <= number)]
    options = {**options_of(tile), "ptx_version": version}
    built = build(_plugin_forward, types, constants, aligned, number, options)
    built = replace(built, ptx=without_scratch(built.ptx, len(given), built.metadata))
    return KernelImage(built, tile.block_m, 32 * tile.num_warps)


def _constants(config: KernelConfig, tile: Tile) -> dict[str, object]:
    return forward_constants(config.dtype, config.head_dim, tile, config.block_q, config.block_kv) | {
        "SCALE": config.scale,
        "H": config.heads,
        "KV_GROUP": config.heads // config.kv_heads,
        "RAGGED": config.ragged,
        "HAS_MASK": config.masked,
        "COMPENSATE": config.compensate,
    }


def without_scratch(ptx: str, wanted: int, metadata: object) -> str:
    """PTX whose entry has its first `wanted` parameters only.

    Raises ExportError if one of the others is used: then the kernel needs memory that TensorRT would not pass.
    """
    used = [n for n in ("global_scratch_size", "profile_scratch_size") if getattr(metadata, n, 0)]
    head = re.search(r"\.visible \.entry \w+\(\n(.*?)\n\)", ptx, re.S)
    parameters = [line.strip().rstrip(",") for line in head[1].splitlines()] if head else []
    extra = [line.split()[-1] for line in parameters[wanted:]]
    used += [name for name in extra if len(re.findall(rf"\b{name}\b", ptx)) != 1]
    if head is None or len(parameters) < wanted or used:
        raise ExportError(
            f"Triton {triton.__version__} built a kernel that can't be embedded: {len(parameters)} parameters for "
            f"{wanted} arguments, in use: {', '.join(used) or 'none'}. Use another version of Triton."
        )
    start, end = head.span(1)
    return ptx[:start] + ",\n".join("\t" + line for line in parameters[:wanted]) + ptx[end:]
