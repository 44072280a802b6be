"""Cases that take long: `slow(case)` runs with -m slow only."""

from __future__ import annotations

import pytest


def slow(*values):
    """A case of `parametrize` that runs with -m slow only."""
    return pytest.param(*values, marks=pytest.mark.slow)


INNER = ["eager", slow("inductor")]
"""Inner compilers: code generation takes seconds a graph."""
