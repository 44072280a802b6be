"""Run an exported model in a process of its own: `python -m dynamicrad_compile.exporting.run FORMAT FILE SAMPLE OUT`.

SAMPLE holds the call (see `sample`), OUT receives the outputs. Prints a line of JSON: seconds to load and to run, and
the memory that running added to what was there after loading, in MiB.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError
from ..optional import optional
from .sample import flat_tensors, read_sample, write_sample


def load(format: str, file: Path) -> Callable[..., Any]:
    """A function that is called like the original model. Raises ExportError if onnxruntime is missing."""
    if format == "torch":
        return torch.export.load(file).module()
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(file))
    if format == "onnx":
        return _load_onnx(file)
    raise ExportError(f"format {format!r} can't be run here. Known: torch, aoti, onnx.")


def _load_onnx(file: Path) -> Callable[..., Any]:
    onnxruntime = optional("onnxruntime", "running ONNX needs", "export", ExportError)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        tensors = flat_tensors((args, kwargs))
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, feed)]

    return run


def main() -> None:
    """See the module."""
    format, file, sample, out = sys.argv[1:]
    start = time.perf_counter()
    function = load(format, Path(file))
    loaded = time.perf_counter() - start
    args, kwargs = read_sample(Path(sample))
    before = _memory("VmRSS")
    start = time.perf_counter()
    with torch.no_grad():
        outputs = flat_tensors(function(*args, **kwargs))
    seconds = time.perf_counter() - start
    added = max(0.0, _memory("VmHWM") - before)
    write_sample(Path(out), outputs, {})
    result = {"load_seconds": round(loaded, 3), "run_seconds": round(seconds, 3), "run_mib": round(added, 1)}
    print(json.dumps(result))


def _memory(field: str) -> float:
    """MiB of this process by /proc: VmRSS now, VmHWM at most so far; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return float(lines[field].split()[0]) / 1024


if __name__ == "__main__":
    main()
