"""Triton's interpreter, shared by the tests of all kernels."""

from __future__ import annotations

import pytest
from support.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    """Computes a case with the Triton kernels: `interpreter(module of support, *case)`."""
    process = Interpreter(tmp_path_factory.mktemp("interpreter"))
    yield process
    process.close()
