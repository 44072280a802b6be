"""A source distribution of the package, and the wheel built from it; one of each for all tests and their processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """(sdist, wheel), built from a copy of the tree, so that nothing is left behind in it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "distributions"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _build(folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def sdist(distributions):
    """The source distribution."""
    return distributions[0]


@pytest.fixture(scope="session")
def wheel(distributions):
    """The wheel, built from the source distribution."""
    return distributions[1]


def _build(folder):
    source = folder.with_name("source")
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "docs", "tests")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    building = folder.with_name("building")
    building.mkdir()
    subprocess.run([sys.executable, "-c", SDIST, str(building)], cwd=source, check=True, capture_output=True)
    (sdist,) = building.glob("*.tar.gz")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel, "--wheel-dir", str(building), str(sdist)], check=True, capture_output=True)
    building.rename(folder)
