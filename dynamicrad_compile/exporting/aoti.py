"""Format "aoti": an AOTInductor package, compiled ahead of time for the device of the model.

Load it with `torch._inductor.aoti_load_package(file)` in a process that has imported dynamicrad_compile.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ExportError
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
        torch._inductor.aoti_compile_and_package(job.program(), package_path=str(job.folder / file))
    except Exception as error:
        raise ExportError(
            f"AOTInductor can't compile the model: {error}\nSee whether format 'torch' works, and `dynamicrad doctor`."
        ) from error
    return {"file": file}
