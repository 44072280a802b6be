"""Where the files of an export go."""

from __future__ import annotations

import os
from pathlib import Path

from ..beforehand import output_file, output_folder
from ..errors import ExportError

SUFFIXES = (".pt2", ".onnx", ".engine")
"""Endings of file names; anything else is a folder."""
WRITTEN = {"torch": (".pt2",), "aoti": (".pt2",), "onnx": (".onnx",), "tensorrt": SUFFIXES}
"""Those of each format."""
NOT_WRITTEN = (".pt", ".pth", ".bin", ".ckpt", ".ts", ".trt", ".plan", ".safetensors", ".json", ".zip")


def place_of(path: str | os.PathLike[str], format: str) -> tuple[Path, str]:
    """Folder and first part of the file names: `out` -> (out, "model"), `out/wan.onnx` -> (out, "wan").

    Raises ExportError if the folder can't be one, or the ending of the file is that of another format.
    """
    target = Path(path)
    if target.suffix in (*SUFFIXES, *NOT_WRITTEN) and target.suffix not in WRITTEN[format] and not target.is_dir():
        endings = " or ".join(WRITTEN[format])
        raise ExportError(
            f"path {str(path)!r}: format {format!r} writes {endings} files. Give such a name, or a folder."
        )
    folder, stem = (target.parent, target.stem) if target.suffix in SUFFIXES else (target, "model")
    if target.suffix in SUFFIXES:
        output_file(target, ExportError)
    else:
        output_folder(target, ExportError)
    return folder, stem
