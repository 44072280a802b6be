"""`nox`: the core of the tests on each version of PyTorch that is supported; docs/platforms.md has what was run where.

    nox                                   all of them
    nox -s "core(2.11.0)"                 one
    nox -s "core(2.11.0)" -- -x -k triton

A version is installed from the index as it comes, on Linux from PyPI with CUDA's libraries: 4 to 7 GB an environment.
PIP_INDEX_URL chooses an index of CPU builds.
"""

from __future__ import annotations

import nox

TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
"""The oldest that is supported to the newest that was tested, the last release of each minor version."""

nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize("torch", TORCH, ids=TORCH)
def core(session: nox.Session, torch: str) -> None:
    """Ops, passes, plans and the backend, without what takes minutes."""
    session.install(f"torch=={torch}")
    numpy = ["numpy<2.4"] if torch == "2.11.0" else []  # for the interpreter of Triton 3.6
    session.install("-e", ".[test,diffusers]", f"torch=={torch}", *numpy)
    session.run("python", "-m", "dynamicrad_compile.cli", "doctor")
    paths = ("tests/kernels", "tests/passes", "tests/plans", "tests/end_to_end/test_backend.py")
    session.run("python", "-m", "pytest", "-n", "2", *paths, *session.posargs, env={"OMP_NUM_THREADS": "1"})
