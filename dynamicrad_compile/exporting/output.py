"""Where the files of an export go."""

from __future__ import annotations

import os
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
