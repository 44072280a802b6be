"""Format "onnx": two models over one file of weights.

STEM.onnx        its nodes of the domain `dynamicrad` come with function bodies: runs in stock onnxruntime
STEM.trt.onnx    without the bodies, for runtimes that have these nodes as plugins
STEM.onnx.data   the weights of both
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import ExportError
from ...optional import install
from ..job import Job

OPSETS = range(18, 24)
STATELESS = True


def check(opset: int = 18) -> None:
    """Raises ExportError if the opset can't be had or a package is missing."""
    if isinstance(opset, bool) or opset not in OPSETS:
        raise ExportError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset!r}.")
    missing = [name for name in ("onnx", "onnxscript") if not _installed(name)]
    if missing:
        raise ExportError(f"format 'onnx' needs {' and '.join(missing)}: {install('export', *missing)}.")


def write(job: Job, opset: int = 18) -> dict[str, Any]:
    """Write the models. The details name inputs, outputs and the nodes of the domain `dynamicrad`."""
    import onnx
    import onnx_ir

    from .functions import attach_functions
    from .nodes import with_onnx_nodes

    sparse = job.program(with_onnx_nodes(job.module))
    job.say(f"translating to ONNX, opset {opset}")
    with _quiet():
        try:
            exported = torch.onnx.export(sparse, dynamo=True, opset_version=opset, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"torch.onnx can't translate the model at opset {opset}: {error}") from error
    assert exported is not None
    file, plugin = f"{job.stem}.onnx", f"{job.stem}.trt.onnx"
    job.say("writing weights")
    onnx_ir.save(exported.model, job.folder / file, external_data=f"{file}.data")
    model = onnx.load(job.folder / file, load_external_data=False)
    _tidy(model, [site.path for site in job.report.replaced])
    onnx.save(model, job.folder / plugin)
    attach_functions(model)
    onnx.save(model, job.folder / file)
    job.say("checking")
    for name in (file, plugin):
        onnx.checker.check_model(str(job.folder / name), full_check=name == file)
    return {
        "file": file,
        "plugin_file": plugin,
        "opset": opset,
        "onnx_inputs": [value.name for value in model.graph.input],
        "onnx_outputs": [value.name for value in model.graph.output],
        "onnx_nodes": sorted({node.op_type for node in model.graph.node if node.domain == "dynamicrad"}),
    }


def _tidy(model: Any, paths: list[str]) -> None:
    """Name our nodes by the modules that they come from, and drop the exporter's notes with paths of this machine.

    Where over booleans, which onnxruntime lacks, becomes (condition and a) or (not condition and b).
    """
    for holder in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del holder.metadata_props[:]
    ours = [node for node in model.graph.node if node.op_type in ("BlockSparseAttention", "SecondOrderAttention")]
    for node, path in zip(ours, paths, strict=True):
        node.name = f"{path}/{node.op_type}"
    booleans = {value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == 9}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        plain = node.op_type != "Where" or node.output[0] not in booleans
        model.graph.node.extend([node] if plain else _boolean_where(node))


def _boolean_where(node: Any) -> list[Any]:
    from onnx import helper

    condition, yes, no = node.input
    (out,) = node.output
    return [
        helper.make_node("And", [condition, yes], [f"{out}/yes"]),
        helper.make_node("Not", [condition], [f"{out}/not"]),
        helper.make_node("And", [f"{out}/not", no], [f"{out}/no"]),
        helper.make_node("Or", [f"{out}/yes", f"{out}/no"], [out]),
    ]


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages and folding, which say nothing about this model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
