"""Triton's interpreter, shared by the tests of all kernels."""

from __future__ import annotations

import pytest
from support.interpreter import Interpreter


@pytest.fixture(autouse=True)
def _no_form_gives_way_unseen(request: pytest.FixtureRequest):
    """On a GPU a form of a kernel that Triton can't build fails its test: the plain kernel would pass in its place."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    from dynamicrad_compile.kernels._launch import BROKEN

    BROKEN.clear()
    yield
    assert not BROKEN


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    """Computes a case with the Triton kernels: `interpreter(module of support, *case)`."""
    process = Interpreter(tmp_path_factory.mktemp("interpreter"))
    yield process
    process.close()
