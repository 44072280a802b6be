"""Start several processes of a worker module and wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]


def start(module: str, world: int, meeting: Path, arguments: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    """Processes `python -m module RANK WORLD FILE ARGUMENTS...`, which meet at the file `meeting`."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module]
    return [
        subprocess.Popen(
            [*command, str(rank), str(world), str(meeting), *arguments],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def output_of(workers: Sequence[subprocess.Popen[str]], timeout: float = 1200) -> str:
    """The last line that process 0 prints, when all have ended well."""
    outputs = [worker.communicate(timeout=timeout) for worker in workers]
    failed = [output[1][-3000:] for worker, output in zip(workers, outputs, strict=True) if worker.returncode]
    assert not failed, "\n".join(failed)
    return outputs[0][0].strip().splitlines()[-1]
