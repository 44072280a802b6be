"""Launcher of the Gluon forward kernels of block-sparse attention, for sm_90."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from ._launch import UNDESCRIBED, attempt, described, multiprocessors, unit_last_stride
from .attention_arguments import Attention, Means
from .tiles import Tile
from .work_triton import list_work

CONSUMERS = {"gluon": 1, "gluon_pingpong": 2}
"""Groups of warps that multiply, by kernel of a tile."""
REGISTERS = 168
"""Of a thread when the kernel starts: what 12 warps (8 that multiply, 4 for the producer) can have at most."""


def why_not(a: Attention, tile: Tile) -> str | None:
    """Why the kernels can't take these arguments with this tile, whatever the layout of the tensors; None: they can."""
    if a.q.dtype == torch.float32 or a.qk_int8:
        return "they multiply fp16 and bf16"
    if not 32 < a.q.shape[3] <= 128:
        return "head_dim must be 33 to 128"
    if a.block_q % tile.block_m or a.block_kv % tile.block_n:
        return f"blocks of {a.block_q} x {a.block_kv} are not whole tiles of {tile.block_m} x {tile.block_n}"
    if isinstance(a.kv_indices.numel(), int) and a.kv_indices.numel() >= 1 << 31:
        return "the plan has 2^31 ids or more"
    return None


def arguments(
    a: Attention,
    means: Means | None,
    tile: Tile,
    results: tuple[torch.Tensor, torch.Tensor],
    work: torch.Tensor,
    describe: Callable[[torch.Tensor, int, int], Any],
) -> dict[str, Any] | None:
    """Arguments of the kernel; None where `describe(x, rows, columns)` gives None for a tensor.

    a: with last strides 1. results: out [B, H, Sq, D] and lse fp32 [B, H, Sq], contiguous, to be written. work: that of
    `list_work`.
    """
    (_, heads, q_len, dim), kv_len = a.q.shape, a.k.shape[2]
    consumers, columns = CONSUMERS[tile.kernel], triton.next_power_of_2(dim)
    mean_k, mean_v = (a.k, a.v) if means is None else (means.keys, means.values)
    tensors = {"q": a.q, "k": a.k, "v": a.v, "mean_k": mean_k, "mean_v": mean_v}
    rows = {"q": tile.block_m // consumers}
    descriptors = {name: describe(x, rows.get(name, tile.block_n), columns) for name, x in tensors.items()}
    if None in descriptors.values():
        return None
    return {
        **descriptors,
        "n_valid": work if means is None else means.counts,
        "weight": results[1] if means is None else means.weight,
        "kept": work if means is None else means.bits,
        "work": work,
        "indices": a.kv_indices,
        "key_mask": work if a.kv_mask is None else a.kv_mask,
        "out": results[0],
        "lse": results[1],
        "scale": a.factor,
        "items": work.shape[0],
        "H": heads,
        "SQ": q_len,
        "SK": kv_len,
        "D": dim,
        "BLOCK_D": columns,
        "BLOCK_KV": a.block_kv,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "RAGGED": kv_len % a.block_kv != 0,
        "HAS_MASK": a.kv_mask is not None,
        "COMPENSATE": means is not None,
        "CONSUMERS": consumers,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps // consumers,
    }


def unit_last_strides(a: Attention) -> Attention:
    """The arguments with tensors whose last dimension is contiguous."""
    q, k, v, indices = (unit_last_stride(x) for x in (a.q, a.k, a.v, a.kv_indices))
    mask = None if a.kv_mask is None else unit_last_stride(a.kv_mask)
    return a._replace(q=q, k=k, v=v, kv_indices=indices, kv_mask=mask)


def descriptor(x: torch.Tensor, rows: int, columns: int) -> Any:
    """x [B, H, S, D], fp16 or bf16, for the copy engine, in tiles of shared memory as products read them; or None."""
    strides = described(x)
    if strides is None:
        return None
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns], NVMMASharedLayout(128, 16, rank=4))


def launch_gluon(a: Attention, means: Means | None, tile: Tile) -> tuple[torch.Tensor, torch.Tensor] | str:
    """(out, lse) as of the op, or why the kernels can't compute them."""
    if reason := why_not(a, tile):
        return reason
    a = unit_last_strides(a)
    out = a.v.new_empty(a.q.shape)
    lse = a.v.new_empty(a.q.shape[:3], dtype=torch.float32)
    work = list_work(a, means, tile)
    given = arguments(a, means, tile, (out, lse), work, descriptor)
    if given is None:
        return UNDESCRIBED

    def launch() -> None:
        from .attention_gluon_kernels import _block_sparse_forward_gluon

        programs = min(work.shape[0], multiprocessors(a.q.device))
        _block_sparse_forward_gluon[(programs,)](**given, maxnreg=REGISTERS)

    return attempt("forward", tile, launch) or (out, lse)
