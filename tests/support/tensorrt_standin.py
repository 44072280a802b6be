"""TensorRT on a machine without a GPU, as far as it goes: what the tests marked `tensorrt` run on.

- `tensorrt` is TensorRT-RTX, whose types are real and which builds engines on the CPU, with stand-ins for the few
  classes that its plugin interface lacks, and with the pure Python `tensorrt.plugin` of the TensorRT bindings.
- `add_plugin` evaluates all Python of a plugin for the tensors at hand, notes the kernel and its launch in `LAUNCHES`,
  and puts a sum of the inputs in its place, so that the network can be built.
- `torch_tensorrt` is imported over it; five functions of torch.cuda answer for a device that is not there.

So converters, partitioning and the conversion to a network are the real ones, and so is all Python of a plugin. Nothing
is launched.
"""

from __future__ import annotations

import enum
import importlib.util
import operator
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

CAPABILITY = (8, 9)
LAUNCHES: list[Launch] = []


@dataclass
class Launch:
    """What a plugin would have launched: sizes are those of the largest shapes of the profile."""

    plugin: str
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    types: list[Any]
    tactics: list[int]
    grid: tuple[int, int, int]
    threads: int
    shared: int
    sizes: list[int]
    name: str
    ptx: str


def install() -> Any:
    """Import torch_tensorrt; skips the test module where the packages are missing."""
    for name in ("tensorrt_rtx", "tensorrt_bindings", "torch_tensorrt"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: see requirements/tensorrt-cpu.txt", allow_module_level=True)
    if "tensorrt" in sys.modules:
        import torch_tensorrt

        return torch_tensorrt
    sys.modules["tensorrt"] = _tensorrt()
    _load_plugin_module(sys.modules["tensorrt"])
    _pretend_device()
    import torch_tensorrt

    if not torch.cuda.is_available():  # its passes make tensors on the GPU
        torch_tensorrt.Device.to = lambda self, kind: torch.device("cpu") if kind is torch.device else self.gpu_id
    return torch_tensorrt


class Dim:
    """A dimension of known size, for tensorrt.IDimensionExpr."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return self.value >= 0

    def get_constant_value(self) -> int:
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class OpenDim(Dim):
    """A dimension that is open in the engine; `value` is that of one call."""

    def is_constant(self) -> bool:
        return False


class ExprBuilder:
    """Evaluates expressions at once, for tensorrt.IExprBuilder."""

    def constant(self, value: int) -> Dim:
        return Dim(value)

    def operation(self, kind: Any, first: Dim, second: Dim) -> Dim:
        names = {"SUM": operator.add, "SUB": operator.sub, "PROD": operator.mul, "FLOOR_DIV": operator.floordiv}
        names |= {"CEIL_DIV": lambda a, b: -(-a // b), "MAX": max, "MIN": min}
        result = names[kind.name](first.value, second.value)
        return Dim(result) if first.is_constant() and second.is_constant() else OpenDim(result)


class DimsExprs(list):
    def __init__(self, dims: Any) -> None:
        super().__init__([None] * dims if isinstance(dims, int) else dims)


def evaluate(
    plugin: Any, kinds: list[Any], shapes: list[tuple[int, ...]], opens: Any = None, tactic: int = 1
) -> Launch:
    """Call a plugin as TensorRT does when it builds an engine; `opens` are the open dimensions, (input, dim)."""
    import tensorrt as trt

    opens = set(opens or ())
    dims = [[(OpenDim if (i, d) in opens else Dim)(n) for d, n in enumerate(s)] for i, s in enumerate(shapes)]
    outputs = plugin.get_output_data_types(kinds, [len(shape) for shape in shapes])
    expressions = plugin.get_output_shapes(dims, [], ExprBuilder())
    out_shapes = [tuple(dim.value for dim in expression) for expression in expressions]
    described = []
    for kind, shape in zip([*kinds, *outputs], [*shapes, *out_shapes], strict=True):
        desc, dynamic = trt.PluginTensorDesc(), trt.DynamicPluginTensorDesc()
        desc.dims, desc.type, desc.format = trt.Dims(shape), kind, trt.TensorFormat.LINEAR
        dynamic.desc = desc
        dynamic.min = dynamic.opt = dynamic.max = trt.Dims(shape)
        described.append(dynamic)
    n = len(shapes)
    combinations = plugin.get_supported_format_combinations(described, n)
    assert [c.type for c in combinations] == [*kinds, *outputs]
    assert all(c.format == trt.TensorFormat.LINEAR for c in combinations)
    plugin.configure_plugin(described[:n], described[n:])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(tactic)
    launch, sizes = types.SimpleNamespace(), SymExprs()
    plugin.get_launch_params(dims, described, n, launch, sizes, ExprBuilder())
    name, ptx = plugin.get_kernel([d.desc for d in described[:n]], [d.desc for d in described[n:]])
    number = {key: value.expr.value for key, value in vars(launch).items()}
    return Launch(
        plugin=plugin.plugin_name,
        inputs=list(shapes),
        outputs=out_shapes,
        types=list(outputs),
        tactics=sorted(tactics),
        grid=(number["grid_x"], number["grid_y"], number["grid_z"]),
        threads=number["block_x"] * number["block_y"] * number["block_z"],
        shared=number["shared_mem"],
        sizes=[sizes[i].expr.value for i in range(sizes.nbSymExprs)],
        name=name,
        ptx=ptx.decode(),
    )


class SymExprs(dict):
    nbSymExprs = 0


def _add_plugin(network: Any, made: Any, aot: bool) -> Any:
    """INetworkDefinition.add_plugin: see above."""
    import tensorrt as trt

    assert aot
    inputs, _, plugin = made(trt.QuickPluginCreationRequest.STRICT_AOT)
    profile = [tuple(64 if n < 0 else n for n in tensor.shape) for tensor in inputs]
    opens = {(i, d) for i, tensor in enumerate(inputs) for d, n in enumerate(tensor.shape) if n < 0}
    LAUNCHES.append(evaluate(plugin, [tensor.dtype for tensor in inputs], profile, opens))
    q, *others = inputs
    total = network.add_cast(q, trt.float32).get_output(0)
    for tensor in others:
        axes = (1 << len(tensor.shape)) - 1
        one = network.add_cast(tensor, trt.float32).get_output(0)
        one = network.add_reduce(one, trt.ReduceOperation.SUM, axes, True).get_output(0)
        flat = network.add_shuffle(one)
        flat.reshape_dims = (1, 1, 1, 1)
        total = network.add_elementwise(total, flat.get_output(0), trt.ElementWiseOperation.SUM).get_output(0)
    out = network.add_cast(total, q.dtype)
    lse = network.add_reduce(total, trt.ReduceOperation.SUM, 1 << 3, False)
    return types.SimpleNamespace(name="", get_output=lambda i: (out, lse)[i].get_output(0))


def _tensorrt() -> Any:
    import tensorrt_rtx

    class Request(enum.Enum):
        UNKNOWN, PREFER_JIT, PREFER_AOT, STRICT_JIT, STRICT_AOT = range(5)

    class SymExpr:
        pass

    class QuickAOTBuild:
        pass

    for name, value in {
        "IDimensionExpr": Dim,
        "DimsExprs": DimsExprs,
        "QuickPluginCreationRequest": Request,
        "ISymExpr": SymExpr,
        "IPluginV3QuickAOTBuild": QuickAOTBuild,
    }.items():
        setattr(tensorrt_rtx, name, value)
    tensorrt_rtx.INetworkDefinition.add_plugin = _add_plugin
    tensorrt_rtx.__version__ = "11.0.0"  # what Torch-TensorRT asks for
    return tensorrt_rtx


def _load_plugin_module(tensorrt: Any) -> None:
    found = importlib.util.find_spec("tensorrt_bindings")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "plugin"
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt.plugin"] = tensorrt.plugin = module
    spec.loader.exec_module(module)


def _pretend_device() -> None:
    if torch.cuda.is_available():
        return
    device = types.SimpleNamespace(
        name="none", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=1 << 34, multi_processor_count=1
    )
    device.is_integrated = False
    answers = {
        "get_device_capability": lambda *_: CAPABILITY,
        "current_device": lambda: 0,
        "mem_get_info": lambda *_: (1 << 34, 1 << 34),
        "get_device_name": lambda *_: "none",
        "get_device_properties": lambda *_: device,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = object  # type: ignore[attr-defined]
    # Its C++ runtime needs a CUDA build of torch; without the file it does without.
    is_file = os.path.isfile
    os.path.isfile = lambda path: "libtorchtrt" not in str(path) and is_file(path)
