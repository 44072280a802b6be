"""TensorRT on a machine without a GPU, as far as it goes: what the tests marked `tensorrt` run on.

- `tensorrt` is TensorRT-RTX, whose types are real and which builds engines on the CPU, with stand-ins for the few
  classes that its plugin interface lacks, and with the pure Python `tensorrt.plugin` of the TensorRT bindings.
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
from pathlib import Path
from typing import Any

import pytest
import torch

CAPABILITY = (8, 9)


def install() -> Any:
    """Import torch_tensorrt; skips the test module where the packages are missing."""
    for name in ("tensorrt_rtx", "tensorrt_bindings", "torch_tensorrt"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: see requirements/tensorrt-cpu.txt", allow_module_level=True)
    if "tensorrt" not in sys.modules:
        sys.modules["tensorrt"] = _tensorrt()
        _load_plugin_module(sys.modules["tensorrt"])
        _pretend_device()
    import torch_tensorrt

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
