"""The forms of the forward and backward kernels, one at a time: tiles of each that are worth a look, and calls of them.

A form that can't serve a case (blocks that cut its tile, fp32) raises Unsupported, and never gives the plain kernel's
result under another name. On the CPU the CPU path stands in for all of them, so that the rows can be tried there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynamicrad_compile.kernels import attention_backward_cpu, attention_cpu
from dynamicrad_compile.kernels.attention_arguments import Attention, Results
from dynamicrad_compile.kernels.means import means_of
from dynamicrad_compile.kernels.tiles import VARIANTS, BackwardTiles, Tile, choose_tile, variant_in_use

from .bench import BLOCK
from .runner import Unsupported

PLAIN = "_block_sparse_forward"  # the plain forward kernel, and with a flag the one of the copy engine
FORWARD = ("triton", *reversed(VARIANTS["forward"]))  # the baseline, then what promises most
BACKWARD = ("triton", *VARIANTS["dq"])
_COMMON = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3),
           (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3))  # fmt: skip
_GLUON = {128: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4))}
_GLUON[64] = ((128, 128, 8, 3), *_GLUON[128])


def candidates(arch: int, dim: int, few: bool = False) -> list[Tile]:
    """Tiles of each form to be timed at a head_dim, in the order of `FORWARD`; `few`: two of each."""
    entry = entry_of(dim)
    found = []
    for kernel in FORWARD if arch // 10 == 9 else FORWARD[:1]:
        sizes = _GLUON.get(entry, ()) if "gluon" in kernel else _COMMON
        found += [Tile(*size, kernel=kernel) for size in (sizes[:2] if few else sizes)]
    return found


def entry_of(dim: int) -> int:
    """The head_dim of the tile table's entry that serves this one."""
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


def current_tile(dtype: torch.dtype, dim: int) -> Tile:
    """The tile that the op takes here, by the table or the environment, with blocks of BLOCK."""
    capability, half = torch.cuda.get_device_capability(), dtype != torch.float32
    return choose_tile(capability, half, dim, BLOCK, BLOCK, variant=variant_in_use(capability, half, dim))


def tile_for(a: Attention, kernel: str) -> Tile:
    """The table's tile of this form for these arguments. Raises Unsupported where another form would run."""
    if _on_cpu(a):
        return Tile(128, 64, 8, 2, kernel)
    capability, half = torch.cuda.get_device_capability(), a.q.dtype != torch.float32
    variant = None if kernel == "triton" else kernel
    tile = choose_tile(capability, half, a.q.shape[3], a.block_q, a.block_kv, variant=variant)
    if tile.kernel != kernel:
        raise Unsupported("such tensors and blocks take the plain kernel")
    return tile


def forward(a: Attention, tile: Tile) -> tuple[Tensor, Tensor]:
    """(out, lse) by the form that the tile names."""
    if _on_cpu(a):
        return attention_cpu.forward(a)
    from dynamicrad_compile.kernels.attention_triton import launch_forward

    splits = 1 if "gluon" in tile.kernel else None  # the small launches of the checks would be split, which Gluon can't
    return launch_forward(a, None if a.compensate is None else means_of(a), tile, splits)


def checked_forward(a: Attention, tile: Tile) -> tuple[Tensor, Tensor]:
    """`forward`. Raises Unsupported if what was launched is not the form that the tile names."""
    names: set[str] = set()
    result = watched(lambda: forward(a, tile), names)
    if "gluon" in tile.kernel and PLAIN in names:
        raise Unsupported("the launcher took the plain kernel")
    if tile.kernel == "tma" and not _on_cpu(a):
        from dynamicrad_compile.kernels._launch import descriptor, sizes_of

        if any(descriptor(x, tile.block_n, sizes_of(x)["BLOCK_D"]) is None for x in (a.k, a.v)):
            raise Unsupported("the copy engine can't read these tensors")
    return result


def backward(a: Attention, results: Results, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by kernels of this form, where they have it. Raises Unsupported where none has."""
    if _on_cpu(a):
        return attention_backward_cpu.backward(a, results)
    from dynamicrad_compile.kernels.attention_backward_triton import launch_backward

    capability, half = torch.cuda.get_device_capability(), a.q.dtype != torch.float32
    chosen = []
    for name in BackwardTiles._fields:
        variant = kernel if kernel in VARIANTS.get(name, ()) else None
        chosen.append(choose_tile(capability, half, a.q.shape[3], a.block_q, a.block_kv, name, variant))
    if kernel != "triton" and all(tile.kernel != kernel for tile in chosen):
        raise Unsupported("the table has no tile of it here")
    return launch_backward(a, results, None if a.compensate is None else means_of(a), BackwardTiles(*chosen))


def _on_cpu(a: Attention) -> bool:
    return a.q.device.type == "cpu"


def watched(call: Callable[[], Any], names: set[str]) -> Any:
    """Result of a call; the names of the Triton kernels that it launches are added to `names`."""
    try:
        from triton import knobs
    except ImportError:
        return call()

    def note(metadata: Any) -> None:
        names.add(metadata.get()["name"])

    hooks = knobs.runtime.launch_enter_hook
    hooks.add(note)
    try:
        return call()
    finally:
        hooks.remove(note)
