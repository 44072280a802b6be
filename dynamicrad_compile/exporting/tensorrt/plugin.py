"""The attention as plugins of TensorRT that carry the Triton kernel as PTX. Importing this registers them.

A plugin has a fixed number of input tensors, so there is one for each of (no mask, mask) x (no means, means). An
engine that holds one runs without Python and without this package. `names` says what the inputs are called.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp
import torch

from ...errors import ExportError
from .kernel import KernelConfig, KernelImage, build_kernel, tiles_of
from .names import NAMESPACE, input_names, plugin_name

ATTRIBUTES = {"scale": np.float32, "block_q": np.int32, "block_kv": np.int32}
"""Attributes of every plugin, each an array of one number: plain numbers would break on numpy 2.4."""

TILE_TACTIC, SMALL_TACTIC = 1, 2
_NAMES = {trt.float16: "fp16", trt.bfloat16: "bf16", trt.float32: "fp32"}


@dataclass
class Target:
    """For what the kernels are built.

    capability  compute capability; None: that of the current device
    small       only the tile that needs less than 48 KiB of shared memory, else TensorRT tries both
    """

    capability: tuple[int, int] | None = None
    small: bool = False


TARGET = Target()


def _capability() -> tuple[int, int]:
    if TARGET.capability is not None:
        return TARGET.capability
    if not torch.cuda.is_available():
        raise ExportError("an engine is built on the GPU that runs it, and there is none here.")
    major, minor = torch.cuda.get_device_capability()
    return major, minor


def _constant(expression: Any, name: str) -> int:
    if not expression.is_constant:
        raise ExportError(f"{name} must be fixed in an engine. Export with dynamic batch or sequence only.")
    return int(expression.constant_value())


def image_of(tensors: dict[str, Any], attributes: dict[str, Any], tactic: int) -> KernelImage:
    """The kernel for a plugin's tensor descriptions and attributes."""
    q, k = tensors["q"], tensors["k"]
    block_kv, kv_len = int(attributes["block_kv"][0]), k.shape_expr[2]
    config = KernelConfig(
        dtype=_NAMES[q.dtype],
        heads=_constant(q.shape_expr[1], "the number of heads"),
        kv_heads=_constant(k.shape_expr[1], "the number of key heads"),
        head_dim=_constant(q.shape_expr[3], "head_dim"),
        block_q=int(attributes["block_q"][0]),
        block_kv=block_kv,
        scale=float(attributes["scale"][0]),
        ragged=not kv_len.is_constant or kv_len.constant_value() % block_kv != 0,
        masked="kv_mask" in tensors,
        compensate="mean_k" in tensors,
    )
    capability = _capability()
    tile, small = tiles_of(capability, config)
    return build_kernel(config, capability, small if tactic == SMALL_TACTIC else tile)


def _describe(tensors: dict[str, Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
    q = tensors["q"]
    batch, heads, length = (q.shape_expr[d] for d in range(3))
    return q.like(), trtp.from_shape_expr((batch, heads, length), trt.float32)


def _formats(tensors: dict[str, Any], attributes: dict[str, Any], outputs: Any) -> list[Any]:
    """One combination of types, that of the network, contiguous; and the tiles to try."""
    kinds = {trt.float16: "FP16", trt.bfloat16: "BF16", trt.float32: "FP32", trt.int32: "INT32"}
    q = tensors["q"]
    if q.dtype not in _NAMES or any(tensor.dtype not in kinds for tensor in tensors.values()):
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ExportError(f"the plugin takes float16, bfloat16 or float32 and int32 tensors, got {found}.")
    types = ", ".join(kinds[tensor.dtype] for tensor in (*tensors.values(), q)) + ", FP32"
    tactics = [SMALL_TACTIC] if TARGET.small else [TILE_TACTIC, SMALL_TACTIC]
    return [trtp.AutoTuneCombination(types, "LINEAR", tactics)]


def _kernel(tensors: dict[str, Any], attributes: dict[str, Any], outputs: Any, tactic: int) -> tuple[Any, ...]:
    """PTX, launch and the integers between the pointers of inputs and outputs."""
    image = image_of(tensors, attributes, tactic)
    q, k, indices = tensors["q"].shape_expr, tensors["k"].shape_expr, tensors["kv_indices"].shape_expr
    launch = trtp.KernelLaunchParams()
    tiles = int(attributes["block_q"][0]) // image.block_m  # of a row of the plan
    launch.grid_x = indices[2] * tiles * q[0] * q[1]
    launch.block_x = image.threads
    launch.shared_mem = image.built.shared
    sizes = [q[2], k[2], indices[0], indices[1], indices[3]]
    sizes += [tensors[name].shape_expr[0] for name in ("kv_mask", "weight") if name in tensors]
    numbers = trtp.SymIntExprs.from_tuple([trtp.SymInt32(size) for size in sizes])
    return image.built.name, image.built.ptx, launch, numbers


def _with_signature(
    function: Callable[..., Any], names: tuple[str, ...], last: dict[str, Any], returns: Any
) -> Callable[..., Any]:
    """`function` of (tensors by name, attributes by name, ...) as TensorRT wants it: one named argument each."""
    annotated = dict.fromkeys(names, trtp.TensorDesc)
    annotated |= {name: np.ndarray[Any, np.dtype[kind]] for name, kind in ATTRIBUTES.items()}  # type: ignore[valid-type]

    def called(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((*annotated, *last), args, strict=False)) | kwargs
        tensors = {name: given[name] for name in names}
        attributes = {name: given[name] for name in ATTRIBUTES}
        return function(tensors, attributes, *(given[name] for name in last))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=a) for name, a in {**annotated, **last}.items()]
    called.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return called


def _register(masked: bool, compensate: bool) -> None:
    plugin = f"{NAMESPACE}::{plugin_name(masked, compensate)}"
    names = input_names(masked, compensate)
    pair = tuple[trtp.TensorDesc, trtp.TensorDesc]
    text = Union[str, bytes]  # noqa: UP007  TensorRT compares it with typing.Union
    trtp.register(plugin)(_with_signature(_describe, names, {}, pair))
    trtp.autotune(plugin)(_with_signature(_formats, names, {"outputs": pair}, list[trtp.AutoTuneCombination]))
    returns = tuple[text, text, trtp.KernelLaunchParams, trtp.SymExprs]
    trtp.aot_impl(plugin)(_with_signature(_kernel, names, {"outputs": pair, "tactic": int}, returns))


for _masked, _compensate in itertools.product((False, True), repeat=2):
    _register(_masked, _compensate)
