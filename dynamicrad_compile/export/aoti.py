"""Format "aoti": an AOTInductor package, compiled ahead of time for the device of the model.

Load it with `torch._inductor.aoti_load_package(file)` in a process that has imported dynamicrad_compile.
"""

from __future__ import annotations

from typing import Any

import torch

from .job import Job

STATELESS = False


def check() -> None:
    """A compiler is looked for by Inductor itself."""


def write(job: Job) -> dict[str, Any]:
    """Write STEM.pt2."""
    file = f"{job.stem}.pt2"
    torch._inductor.aoti_compile_and_package(job.program(), package_path=str(job.folder / file))
    return {"file": file}
