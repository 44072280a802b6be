"""The model card: a JSON file beside an exported model that says what is in it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch

from ..options import Options
from ..reporting.report import Report
from ..runtime.router import Router

SCHEMA = 1
PACKAGES = ("dynamicrad-compile", "torch", "triton", "diffusers", "onnx", "onnxscript", "onnxruntime", "numpy")


def model_card(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    options: Options,
    report: Report,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """Content of the card. `details`: what the writer of the format adds, such as the opset."""
    replaced = report.replaced
    grids = dict.fromkeys(site.grid for site in replaced)
    sparsity = sum(site.sparsity for site in replaced) / len(replaced) if replaced else 0.0
    return {
        "schema": SCHEMA,
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "grids": [list(grid) for grid in grids if grid],
        "sparsity": sparsity,
        "options": _options(options),
        "replaced": len(replaced),
        "attentions": len(report.sites),
        "notes": report.notes,
        **details,
        "inputs": {name: describe(value) for name, value in inputs.items()},
        "sites": [site.to_dict() for site in report.sites],
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe(value: Any) -> Any:
    """An input for the card: dtype and shape of a tensor, a number or a text as it is."""
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__name__


def _options(options: Options) -> dict[str, Any]:
    given = options.model_dump(exclude_unset=True, exclude={"router", "plan", "dump"}, mode="json")
    if options.plan is not None:
        given["plan"] = describe(options.plan)
    if options.router is not None:
        router = options.router
        given["router"] = router.encoder if isinstance(router, Router) else str(router)
    return given


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
