"""Cases that take long: `slow(case)` runs with -m slow only."""

from __future__ import annotations

import pytest


def slow(*values):
    """A case of `parametrize` that runs with -m slow only."""
    return pytest.param(*values, marks=pytest.mark.slow)


def fast(cases, quick):
    """`cases` for parametrize: those in `quick` run always, the others with -m slow only."""
    return [case if case in quick else slow(case) for case in cases]


INNER = ["eager", slow("inductor")]
"""Inner compilers: code generation takes seconds a graph."""
