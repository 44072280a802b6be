"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ExportError

SUFFIXES = (".pt2", ".onnx", ".engine")


def place_of(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """Folder and first part of the file names: `out` -> (out, "model"), `out/wan.onnx` -> (out, "wan").

    Raises ExportError if the folder can't be one.
    """
    target = Path(path)
    folder, stem = (target.parent, target.stem) if target.suffix in SUFFIXES else (target, "model")
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ExportError(f"path {str(path)!r}: {existing} is a file. Give a folder, or a file name in a folder.")
    return folder, stem


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder; its files move to `folder` at the end, and nothing does if an error is raised.

    It lies beside the target, so that moving is renaming. Files of the same names are replaced.
    """
    missing = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name or 'export'}.", suffix=".partial", dir=parent))
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.suffix in SUFFIXES):  # what they refer to first
            os.replace(file, folder / file.name)
        missing = []
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for place in missing:  # folders made for nothing, the innermost first
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
