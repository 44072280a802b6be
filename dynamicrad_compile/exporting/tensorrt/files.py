"""Format "tensorrt": what TensorRT runs, or what it builds that from.

via="torch"     STEM.pt2: engines by Torch-TensorRT in a torch.export program, on the GPU that will run them
via="plugin"    STEM.onnx with the attention as plugin nodes; a command builds STEM.engine from it on that GPU
via="trtexec"   STEM.onnx in standard operators, for trtexec or TensorRT-RTX as they come; as slow as dense attention

The last two need no GPU and no TensorRT here. The commands are printed, and are in the model card.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...errors import ExportError, nearest
from ..job import Job
from ..onnx import model as onnx_model
from .graph import lower
from .onnx import write_onnx

VIA = ("torch", "plugin", "trtexec")
STATELESS = True


def check(via: str = "torch", opset: int = 18, engine_options: Mapping[str, Any] | None = None) -> None:
    """Raises ExportError if a setting is wrong or a package or the GPU is missing."""
    if via not in VIA:
        raise ExportError(f"via must be one of {', '.join(VIA)}, got {via!r}.{nearest(str(via), VIA)}")
    if engine_options is not None and (via != "torch" or not isinstance(engine_options, Mapping)):
        raise ExportError(
            f"engine_options is a dict of Torch-TensorRT's settings, for via='torch', got {engine_options!r}."
        )
    if via != "torch":
        onnx_model.check(opset)
        return
    from .compile import INSTALL, register

    register()
    if not torch.cuda.is_available():
        raise ExportError(
            "format 'tensorrt' with via='torch' builds engines on the GPU that runs them, and there is none here. "
            f"Needed: {INSTALL}. "
            "Without one use via='plugin' or via='trtexec', which write ONNX models to build engines from."
        )


def write(
    job: Job, via: str = "torch", opset: int = 18, engine_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the files. The details hold the commands that make or run an engine, and what runs outside of one."""
    if via == "torch":
        return _write_engines(job, dict(engine_options or {}))
    file = write_onnx(job, via, opset)
    commands = build_commands(job, file, via)
    for command in commands:
        job.say(f"then: {command}")
    return {"file": file, "via": via, "opset": opset, "commands": commands}


def build_commands(job: Job, file: str, via: str) -> list[str]:
    """Shell commands that build and run an engine from an ONNX model, on the machine that has the GPU."""
    engine = f"{job.stem}.engine"
    if via == "plugin":
        return [
            f"python -m dynamicrad_compile.exporting.tensorrt.build {file} {engine}" + _shapes(job, "--{}", "="),
            f"trtexec --loadEngine={engine}",
        ]
    build = f"trtexec --onnx={file} --saveEngine={engine} --stronglyTyped"
    return [build + _shapes(job, "--{}Shapes", "="), f"trtexec --loadEngine={engine}"]


def _shapes(job: Job, flag: str, sign: str) -> str:
    """Flags for the shapes of a model whose batch is open: one row, the example's rows, and four times as many."""
    if not job.dynamic_shapes:
        return ""
    program = job.program()
    user = set(program.graph_signature.user_inputs)
    tensors = {
        node.name: node.meta["val"].shape
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in user and isinstance(node.meta.get("val"), torch.Tensor)
    }
    open_inputs = {name: shape for name, shape in tensors.items() if isinstance(shape[0], torch.SymInt)}
    rows = next(
        leaf.shape[0]
        for leaf in torch.utils._pytree.tree_leaves((job.args, job.kwargs))
        if isinstance(leaf, torch.Tensor)
    )
    text = ""
    for name, batch in (("min", 1), ("opt", rows), ("max", 4 * rows)):
        shapes = ",".join(f"{key}:{'x'.join(map(str, (batch, *shape[1:])))}" for key, shape in open_inputs.items())
        text += f" {flag.format(name)}{sign}{shapes}"
    return text


def _write_engines(job: Job, engine_options: dict[str, Any]) -> dict[str, Any]:
    import torch_tensorrt

    from .compile import placement

    module = fx.GraphModule(job.module, copy.deepcopy(job.module.graph))
    lower(module)
    program = job.program(module)
    job.say("building engines with Torch-TensorRT")
    with torch._functorch.config.patch(decompose_custom_triton_ops=False):
        compiled = torch_tensorrt.dynamo.compile(
            program, arg_inputs=job.args, kwarg_inputs=job.kwargs, **engine_options
        )
    where = placement(compiled)
    job.say(where)
    file = f"{job.stem}.pt2"
    torch_tensorrt.save(compiled, str(job.folder / file), retrace=False)  # the open sizes are in the graph
    return {"file": file, "via": "torch", "placement": where, "torch_tensorrt": torch_tensorrt.__version__}
