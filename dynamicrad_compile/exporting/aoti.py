"""Format "aoti": an AOTInductor package, compiled ahead of time for the device of the model.

Load it with `torch._inductor.aoti_load_package(file)` in a process that has imported dynamicrad_compile.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..errors import ExportError
from ..kernels.define import HAS_TRITON
from .job import Job

STATELESS = False


def check() -> None:
    """Raises ExportError if there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ExportError(
            f"format 'aoti' needs a C++ compiler ({error}). Install g++, or name a compiler in the variable CXX."
        ) from error


def write(job: Job) -> dict[str, Any]:
    """Write STEM.pt2. Raises ExportError if Inductor can't compile the model."""
    file = f"{job.stem}.pt2"
    try:
        with _plain_kernels():
            torch._inductor.aoti_compile_and_package(job.program(), package_path=str(job.folder / file))
    except Exception as error:
        raise ExportError(
            f"AOTInductor can't compile the model: {error}\nSee whether format 'torch' works, and `dynamicrad doctor`."
        ) from error
    return {"file": file}


def _plain_kernels() -> AbstractContextManager[None]:
    """The package holds the kernels themselves: one of another form would be an op that only Python can run."""
    if not HAS_TRITON:
        return nullcontext()
    from ..kernels._launch import plain_kernels

    return plain_kernels()
