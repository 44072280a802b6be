"""Export of a sparse model: torch.export programs, AOTInductor packages, ONNX models, TensorRT engines.

    dynamicrad_compile.export(model, args, kwargs, path, format="onnx")

`dynamicrad_compile.export` is this package and can be called: it is the function of `api`. The order of the work is

    torch.export -> rewrite (the passes of the backend) -> one of FORMATS -> card.json beside what was written
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from typing import Any

from .api import FORMATS, export
from .job import Exported, Job
from .rewriting import rewrite

__all__ = ["FORMATS", "Exported", "Job", "export", "rewrite"]


class _Callable(types.ModuleType):
    """A module that is called like the function of the same name."""

    @functools.wraps(export)
    def __call__(self, *args: Any, **kwargs: Any) -> Exported:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
__signature__ = inspect.signature(export)
