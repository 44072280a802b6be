"""TensorRT: importing this registers the attention with Torch-TensorRT and TensorRT.

    torch.compile(model, backend="dynamicrad", options={"inner": "tensorrt"})      compile_graph
    dynamicrad_compile.export(..., format="tensorrt")                              check, write

graph      the op in the form that a plugin takes; needs no TensorRT
kernel     the Triton kernel as PTX; needs no TensorRT
plugin     the plugins
converter  the converter of Torch-TensorRT
files      the files of format="tensorrt"
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...errors import ExportError
from ...optional import install
from .graph import has_state, lower

INSTALL = f"{install('tensorrt', 'torch_tensorrt')}, on a machine with an NVIDIA GPU and a CUDA build of torch 2.13"


def register() -> None:
    """Register plugins and converter. Raises ExportError if Torch-TensorRT or the plugins of TensorRT are missing."""
    try:
        importlib.import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        raise ExportError(f"TensorRT needs {error.name}, which is not installed. Install it: {INSTALL}.") from error
    except Exception as error:  # it raises whatever its libraries do
        raise ExportError(
            f"torch_tensorrt is installed, but can't be imported: {error}. Install it anew: {INSTALL}."
        ) from error
    if importlib.util.find_spec("tensorrt.plugin") is None:
        raise ExportError(
            "this TensorRT has no Python plugins (TensorRT-RTX has none). Use torch-tensorrt instead of "
            f"torch-tensorrt-rtx: {INSTALL}; or via='trtexec', whose models need no plugin."
        )
    try:
        importlib.import_module(".converter", __package__)
    except ImportError as error:
        raise ExportError(
            f"the plugins of this TensorRT or the converters of this Torch-TensorRT are not as expected: {error}. "
            f"Install the versions that were tested: {INSTALL}."
        ) from error


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any],
    note: Callable[[str], None],
) -> Callable[..., Any]:
    """Compile a rewritten graph with the backend of Torch-TensorRT.

    options: of that backend, such as {"min_block_size": 1}. note: is told what runs in PyTorch instead of an engine,
    all of it if no engine could be built. With pass_through_build_failures=True that raises instead.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.registry import lookup_backend

    register()
    lower(gm)
    whole = fx.GraphModule(gm, copy.deepcopy(gm.graph))  # Torch-TensorRT changes what it is given
    settings = {"pass_through_build_failures": True, **options}
    backend = lookup_backend("torch_tensorrt")

    def build(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        for target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            for node in graph.graph.find_nodes(op="call_function", target=target):
                node.target = torch.ops.aten.reshape.default  # its decompositions change strides
        graph.recompile()
        compiled = backend(graph, inputs, options=settings)
        note(placement(compiled))
        return compiled

    # What a call leaves for the next one must be an input of an engine and not a constant in it: AOT autograd sees to
    # that, and writes back what has changed.
    compiler = aot_autograd(fw_compiler=build) if has_state(gm) else build
    try:
        with torch._functorch.config.patch(decompose_custom_triton_ops=False):  # select_blocks stays one operation
            return compiler(gm, example_inputs)
    except Exception as error:
        if options.get("pass_through_build_failures"):
            raise
        note(f"TensorRT: no engine could be built, the graph runs in PyTorch: {type(error).__name__}: {error}")
        return whole.forward


def placement(compiled: torch.nn.Module) -> str:
    """How many engines a module compiled by Torch-TensorRT has, and which operations run in PyTorch between them."""
    parts = list(compiled.named_children())
    graphs = [part for _, part in parts if isinstance(part, fx.GraphModule)]
    outside: Counter[str] = Counter()
    for graph in (compiled, *graphs):
        if isinstance(graph, fx.GraphModule):
            outside.update(
                str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)
            )
    engines = len(parts) - len(graphs)
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(outside.items())) or "nothing"
    return f"TensorRT: {engines} engine{'s' * (engines != 1)}; in PyTorch: {listed}"


register()
