"""Check the contracts of [tool.importlinter] in pyproject.toml: which room may import from which.

passes/, kernels/ and profiles/ reach the package through links, and kernels/ has no __init__.py, so the linter would
not look into them. It runs on a copy in which they are folders of the package, as they are installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINTER = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def copy_package(folder: Path) -> Path:
    """Copy the package without links into the folder, with pyproject.toml beside it; returns the package."""
    package = folder / "dynamicrad_compile"
    shutil.copytree(ROOT / "dynamicrad_compile", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "kernels" / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", folder)
    return package


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter on a copy."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", LINTER, "--no-cache", str(folder / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        copy_package(Path(temporary))
        done = check(Path(temporary))
    print(done.stdout + done.stderr)
    sys.exit(done.returncode)
