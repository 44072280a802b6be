"""What the launchers of the Triton kernels share: how a kernel is called, strides, sizes, and what the device is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import is_fake
from triton.errors import TritonError

from .attention_arguments import Means
from .chip import Chip, chip_of
from .tiles import Tile

log = logging.getLogger(__name__)


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)
"""True if Triton was imported with TRITON_INTERPRET=1."""


UNDESCRIBED = "a tensor can't be read by the copy engine, which needs an address and strides that divide by 16 bytes"
BROKEN: dict[tuple[str, Tile], str] = {}
"""Variants of kernels that Triton could not build, and why; they are not tried again."""


def attempt(kernel: str, tile: Tile, launch: Callable[[], object]) -> str | None:
    """Launch a variant of a kernel; None if it was launched, else why Triton could not build it."""
    if (kernel, tile) not in BROKEN:
        try:
            launch()
            return None
        except (ImportError, AttributeError, TypeError, TritonError) as error:
            found: Exception = error
        except RuntimeError as error:
            if "PassManager" not in str(error):  # that of MLIR; others are CUDA's
                raise
            found = error
        last = (str(found).strip().splitlines() or [""])[-1]
        BROKEN[kernel, tile] = f"Triton {triton.__version__} can't build it ({type(found).__name__}: {last})"
    return BROKEN[kernel, tile]


@cache
def instead(kernel: str, variant: str | None, reason: str) -> None:
    """Say once that a variant of a kernel could not run: a warning where it should have."""
    level = logging.WARNING if "can't build" in reason else logging.INFO
    log.log(level, "attention kernel %s, %s: the plain kernel runs instead: %s", kernel, variant, reason)


def variants_allowed() -> bool:
    """Whether an op may launch another form of a kernel, which compilers see as an op that they can't look into.

    Not while AOTInductor compiles: its packages hold the kernels themselves and run without Python.
    """
    inductor = sys.modules.get("torch._inductor.virtualized")
    return inductor is None or inductor.V.aot_compilation is not True


def wrap_triton(kernel: Any, described: bool = False) -> Any:
    """A kernel to be called as `wrap_triton(kernel)[grid](...)`, which compilers see as it is.

    described: it takes descriptors, which can't be traced.
    """
    return kernel if INTERPRETED or described else torch.library.wrap_triton(kernel)


def chip(device: torch.device) -> Chip:
    """The chip of a device; the interpreter takes the tiles of sm_90."""
    return (9, 0) if INTERPRETED else chip_of(device)


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 operands are computed: three of TF32 on tensor cores, in fp32 on AMD."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def multiprocessors(device: torch.device) -> int:
    """Their number; the interpreter takes that of an H100."""
    return 132 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def shared_strides(x: torch.Tensor, *dims: int) -> tuple[int, ...]:
    """Strides, 0 where the size is 1 and the entry serves all."""
    return tuple(x.stride(d) if x.shape[d] > 1 else 0 for d in dims)


def row_strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of a plan's table [P, H', Mq, ...] between samples, heads and rows."""
    return (*shared_strides(x, 0, 1), x.stride(2))


def sizes_of(x: torch.Tensor) -> dict[str, Any]:
    """The constants of a kernel that follow from the last dimension and the dtype of q or v."""
    return {
        "D": x.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(x.shape[-1])),
        # The interpreter's tl.dot is wrong for bf16.
        "WIDEN": INTERPRETED and x.dtype == torch.bfloat16,
        "PRECISION": precision(x.dtype),
    }


def tile_sizes(tile: Tile) -> dict[str, int]:
    """The constants and launch options of a tile."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def mean_operands(means: Means | None, unread: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """The five tensors and the five strides by which kernels find `means`; `unread` stands for those of None."""
    if means is None:
        return (unread,) * 5, (0,) * 5
    return tuple(means), (*shared_strides(means.counts, 0), *shared_strides(means.weight, 0), *row_strides(means.bits))


def described(x: torch.Tensor) -> list[int] | None:
    """Strides by which the copy engine of sm_90 can read x [B, H, S, D]; None where it can't.

    It needs an address and strides of 16 bytes, the last stride 1, and sizes that are known. The stride of a dimension
    of size 1, which says nothing, may be anything.
    """
    offset = x.storage_offset() if is_fake(x) else 0
    if not all(isinstance(n, int) for n in (*x.shape, *x.stride(), offset)):
        return None
    # A fake tensor has no address, but allocators give storages one that divides by 16.
    address = offset * x.element_size() if is_fake(x) else x.data_ptr()
    whole = 16 * x.shape[3]  # a stride that is as good as any
    strides = [whole if n == 1 else s for n, s in zip(x.shape[:3], x.stride(), strict=False)]
    if not x.numel() or address % 16 or x.stride(3) != 1 or any(s * x.element_size() % 16 or s <= 0 for s in strides):
        return None
    return [*strides, 1]


def descriptor(x: torch.Tensor, rows: int, columns: int) -> Any:
    """x [B, H, S, D] for the copy engine of sm_90, in blocks [1, 1, rows, columns]; None where it can't be read."""
    strides = described(x)
    if strides is None:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns])


def launch_described(
    kernel: str, tile: Tile, plain: Tile, rows: int, tensors: Sequence[torch.Tensor], launch: Callable[..., None]
) -> None:
    """`launch(tile, *tensors)`; for a tile of the variant "tma" with descriptors of the tensors, in blocks of `rows`.

    With the tile `plain` and the tensors themselves where that can't be.
    """
    if tile.kernel == "tma":
        columns = sizes_of(tensors[0])["BLOCK_D"]
        found = [descriptor(x, rows, columns) for x in tensors]
        reason = UNDESCRIBED if None in found else attempt(kernel, tile, lambda: launch(tile, *found))
        if reason is None:
            return
        instead(kernel, "tma", reason)
        tile = plain
    launch(tile, *tensors)
