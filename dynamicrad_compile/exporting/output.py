"""Where the files of an export go."""

from __future__ import annotations

import os
from pathlib import Path

from ..beforehand import output_file, output_folder
from ..errors import ExportError

SUFFIXES = (".pt2", ".onnx", ".engine")


def place_of(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """Folder and first part of the file names: `out` -> (out, "model"), `out/wan.onnx` -> (out, "wan").

    Raises ExportError if the folder can't be one.
    """
    target = Path(path)
    folder, stem = (target.parent, target.stem) if target.suffix in SUFFIXES else (target, "model")
    if target.suffix in SUFFIXES:
        output_file(target, ExportError)
    else:
        output_folder(target, ExportError)
    return folder, stem
