"""Format "torch": a torch.export program.

Load it with `torch.export.load(file).module()` in a process that has imported dynamicrad_compile.
"""

from __future__ import annotations

from typing import Any

import torch

from .job import Job

STATELESS = False


def check() -> None:
    """Nothing is needed beyond torch."""


def write(job: Job) -> dict[str, Any]:
    """Write STEM.pt2."""
    file = f"{job.stem}.pt2"
    torch.export.save(job.program(), job.folder / file)
    return {"file": file}
