"""Shared fixtures: a clean Dynamo for every test, and poisoned uninitialised memory."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Some virtual machines report AMX and trap on it; oneDNN would die of an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch

from dynamicrad_compile.kernels import moments_op as _registers_the_ops  # noqa: F401

# Compiled code spells out the arguments of an op, which PyTorch's caches on disk do not hash.
torch.compiler.config.cache_key_tag = " ".join(
    sorted(str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("dynamicrad::"))
)


@pytest.fixture(autouse=True)
def _clean_state():
    """No compiled code survives a test, random numbers are the same in each, `torch.empty` is full of NaN."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
