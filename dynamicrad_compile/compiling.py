"""drad.compile: torch.compile, and the capture settings that one call by name can't give."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .options import Options

CAPTURE = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
"""Dynamo settings under which sizes that depend on data do not break the graph (Mochi, HunyuanVideo 1.5, FramePack)."""


def compile(
    model: Any, *, fullgraph: bool = False, dynamic: bool | None = None, mode: str | None = None, **options: Any
) -> Any:
    """`torch.compile(model, backend="dynamicrad")` with the capture settings that some video models need.

    fullgraph, dynamic and mode are torch.compile's; all other keywords are `Options`, checked at once.
    While the compiled model runs, and for no other, Dynamo captures operations whose output size depends on data,
    so that attention over a prompt cut to its valid tokens stays in the graph.

    Returns the compiled model. Raises OptionsError.
    """
    Options.from_mapping(options)
    compiled = torch.compile(
        model, backend="dynamicrad", fullgraph=fullgraph, dynamic=dynamic, mode=mode, options=options or None
    )
    if isinstance(compiled, torch.nn.Module):
        compiled.forward = _with_capture(compiled.forward)
        return compiled
    return _with_capture(compiled)


def _with_capture(function: Any) -> Any:
    @functools.wraps(function)
    def captured(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(CAPTURE):
            return function(*args, **kwargs)

    captured.dynamicrad_capture = True  # type: ignore[attr-defined]
    return captured


def captures_data_dependent(compiled: Any) -> bool:
    """Whether something was compiled by `drad.compile`."""
    return hasattr(getattr(compiled, "forward", compiled), "dynamicrad_capture")
