"""A check of what was written: load it in a fresh process, run it, compare with the rewritten model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import ExportError
from ..optional import optional
from .job import Job
from .sample import flat_tensors, read_sample, write_sample

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error (norm of the difference over the norm), by the dtype of the output."""

RUNNABLE: dict[str, tuple[str, ...]] = {"torch": (), "aoti": (), "onnx": ("onnxruntime",)}
"""Formats that `run` can run, and the packages that this needs."""


def check_runnable(format: str) -> None:
    """Raises ExportError if `check_export` can't run models of the format, or a package that it needs is missing."""
    if format not in RUNNABLE:
        raise ExportError(f"check: format {format!r} can't be run here, only {', '.join(RUNNABLE)}.")
    for module in ("safetensors", *RUNNABLE[format]):
        optional(module, "a check needs", "export", ExportError)


def check_export(job: Job, format: str, file: str) -> dict[str, Any]:
    """Relative error of a file in job.folder, for the example call, and what `run` prints of times and memory.

    Raises ExportError if it can't be run or the error is larger than TOLERANCE.
    """
    with torch.no_grad():
        expected = flat_tensors(job.module(*job.args, **job.kwargs))
    found, measured = run_fresh(format, job.folder / file, job.args, job.kwargs)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    worst = max(errors)
    limit = max(TOLERANCE.get(tensor.dtype, 1e-4) for tensor in expected)
    if not worst <= limit:
        raise ExportError(f"the {format} model differs from the rewritten one by {worst:.1e} (limit {limit:.0e}).")
    return {"relative_error": worst, **measured}


def run_fresh(
    format: str, file: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Outputs of an exported model in a process that imports torch and this package only, and what `run` prints."""
    with TemporaryDirectory(prefix="dynamicrad-check-") as folder:
        sample, out = Path(folder, "sample.safetensors"), Path(folder, "out.safetensors")
        write_sample(sample, args, kwargs)
        command = [sys.executable, "-m", f"{__package__}.run", format, str(file), str(sample), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExportError(f"the {format} model can't be run in a fresh process:\n{done.stderr.strip()[-2000:]}")
        outputs, _ = read_sample(out)
    return list(outputs), json.loads(done.stdout.splitlines()[-1])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
