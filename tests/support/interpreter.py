"""Triton's interpreter, in a process of its own because it is chosen when Triton is imported.

The process stays up while tests ask it for cases: a case is computed once, and only if its test is run. What a case
computes is the function `interpret` of a module beside this one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import torch


class Interpreter:
    """Computes cases in another process, whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.results = folder / "results.npz"
        self.errors = (folder / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.interpreter", str(self.results)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def __call__(self, module: str, *case: str) -> tuple[torch.Tensor, ...]:
        """Results of `support.<module>.interpret(*case)`; fails with the traceback of the other process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([f"support.{module}", *case]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise RuntimeError(f"the interpreter's process ended: {self.errors.read()}")
        if failure := json.loads(answer):
            raise RuntimeError(failure)
        with np.load(self.results, allow_pickle=False) as results:
            return tuple(torch.from_numpy(results[name]) for name in results.files)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.errors.close()


def serve(results: str) -> None:
    """Compute the cases that are named on stdin, a line of JSON each; answer null, or the traceback."""
    for line in sys.stdin:
        module, *case = json.loads(line)
        try:
            tensors = importlib.import_module(module).interpret(*case)
            np.savez(results, *(x.numpy() for x in tensors))
            answer = None
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
