"""rewrite: the passes on a program of torch.export instead of a graph of torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..backend import analyse
from ..errors import DynamicRadError
from ..options import Options
from ..reporting.report import Report


def rewrite(program: Any, options: Mapping[str, Any] | None = None) -> tuple[fx.GraphModule, Report]:
    """Make the video self-attention of an exported program block-sparse.

    program: what torch.export.export returned. Do it before run_decompositions(), which takes attention apart.
    options: those of the backend; `inner` and `inner_options` have no meaning here.

    Returns the rewritten module and a report. The module is called like the original model. It can run as it is, or
    go to torch.export.export again, to torch.compile, or to AOTInductor; loading a saved program needs
    `import dynamicrad_compile` first. The program itself is not changed.

    Dynamic sizes stay dynamic: plans are then made when the program runs, for the sizes that it meets. Where an axis
    of the grid is in no shape of the program, attention stays dense, and the report says so.

    The result is for inference.

    Raises DynamicRadError if `program` is no exported program, and OptionsError, ProfileError, GridError or
    StrictError as the backend does.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise DynamicRadError(
            f"rewrite takes what torch.export.export(model, args, kwargs) returns, got {type(program).__name__}. "
            "For a model use torch.compile(model, backend='dynamicrad')."
        )
    parsed = Options.from_mapping(options)
    gm = program.module()
    report = analyse(gm, (), parsed, is_final=True)
    if not report.sites and any("softmax" in str(node.target) for node in gm.graph.nodes):
        report.notes.append(
            "no attention was found, but a softmax: was run_decompositions() called? Rewrite the program before it."
        )
    return gm, Report([report])
