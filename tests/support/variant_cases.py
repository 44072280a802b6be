"""The benchmark suite's calls of each form of the kernels, computed by Triton's interpreter as on sm_90."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from suite import correctness, variant_checks, variants
from suite.runner import Unsupported

SMALL = {"q_len": 200, "kv_len": 200, "dim": 64, "heads": 1, "kv_heads": 1}
CASES = {
    "blocks of 128": correctness.Case("even", **SMALL),
    "blocks of 64": correctness.Case("means", block_q=64, block_kv=64, compensate=(1.0,), **SMALL),
    "fp32": correctness.Case("fp32", dtype=torch.float32, **SMALL),
}


def interpret(kernel: str, name: str, direction: str) -> tuple[torch.Tensor, ...]:
    """The error of one check; -1 where the form can't serve the case."""
    variants._on_cpu = lambda a: False
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    try:
        if direction == "forward":
            values = correctness.check_forward(CASES[name], "cpu", variant_checks._forward(kernel))
        else:
            values = correctness.check_backward(CASES[name], "cpu", variant_checks._gradients(kernel))
    except Unsupported:
        return (torch.tensor(-1.0),)
    return (torch.tensor(values["error"]),)
