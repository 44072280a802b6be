"""What passes between `export` and the writers of the formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..errors import ExportError
from ..options import Options
from ..reporting.report import Report


@dataclass(frozen=True)
class Job:
    """A rewritten model on its way to a file.

    module          the rewritten graph module, called like the original model
    args, kwargs    an example call; with a dynamic batch it has at least two rows
    dynamic_shapes  of torch.export, for another export of the module; None: all sizes are fixed
    folder          an empty temporary folder: all files go there
    stem            how their names begin
    options         of the backend
    report          what the passes did
    say             tells the user what is going on
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    folder: Path
    stem: str
    options: Options
    report: Report
    say: Callable[[str], None]

    def program(self, module: torch.nn.Module | None = None) -> torch.export.ExportedProgram:
        """The module, or another one that is called like it, as a torch.export program. Raises ExportError."""
        return capture(module or self.module, self.args, self.kwargs, self.dynamic_shapes)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    format   "torch", "aoti", "onnx" or "tensorrt"
    path     the file to load
    files    all files, the model card last
    report   what was replaced in the model, and why not the rest
    card     content of the model card
    seconds  time of each step
    module   the rewritten model in eager code, called like the original, to compare with
    """

    format: str
    path: Path
    files: list[Path]
    report: Report
    card: Mapping[str, Any] = field(repr=False)
    seconds: Mapping[str, float]
    module: fx.GraphModule = field(repr=False)

    def __str__(self) -> str:
        sizes = [f"  {file}  {_size(file.stat().st_size)}" for file in self.files]
        return "\n".join([self.report.summary(), f"{self.format}, {sum(self.seconds.values()):.1f} s:", *sizes])


def capture(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """torch.export.export without gradients; its errors come as ExportError, with what to do."""
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export can't capture {type(module).__name__}: {error}\nTry the call itself first: "
            "model(*args, **kwargs). With dynamic_batch, name the inputs that have a batch."
        ) from error


def _size(count: int) -> str:
    """12345678 -> '12.3 MB'."""
    number, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if number >= 1000:
            number, unit = number / 1000, larger
    return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
