"""Export of a sparse model: torch.export programs, AOTInductor packages, ONNX models, TensorRT engines.

    dynamicrad_compile.export(model, args, kwargs, path, format="onnx")

The order of the work, which `api` holds, is

    torch.export -> rewrite (the passes of the backend) -> one of FORMATS -> card.json beside what was written
"""

from __future__ import annotations

from .api import FORMATS, export
from .job import Exported, Job
from .rewriting import rewrite

__all__ = ["FORMATS", "Exported", "Job", "export", "rewrite"]
