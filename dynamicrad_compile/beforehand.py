"""What can be told before the first expensive step: places to write to, libraries, devices, folders of pipelines.

Imports no torch. Every function raises the class of `error`, which is DynamicRadError where nothing else is said.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import DynamicRadError
from .optional import optional


def output_file(
    path: str | os.PathLike[str], error: type[DynamicRadError] = DynamicRadError, new_folder: bool = True
) -> Path:
    """The path, if a file can be written there; missing folders can be made, if `new_folder`."""
    target = Path(path)
    if target.is_dir():
        raise error(f"{target} is a folder: give the path of a file.")
    if not new_folder and not target.parent.is_dir() and not target.parent.exists():
        raise error(f"{target} can't be written: No such file or directory: {target.parent}.")
    _check_writable(target, target.parent, error)
    return target


def output_folder(path: str | os.PathLike[str], error: type[DynamicRadError] = DynamicRadError) -> Path:
    """The path, if it is a folder to write to or can be made one."""
    target = Path(path)
    _check_writable(target, target, error)
    return target


def _check_writable(target: Path, folder: Path, error: type[DynamicRadError]) -> None:
    """Raises if no file can be made in the folder, or in the nearest one above it that exists."""
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise error(f"{target} can't be written: File exists: {existing} is a file, not a folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as problem:
        raise error(f"{target} can't be written: {existing}: {problem.strerror}.") from None


def usable_device(name: str, error: type[DynamicRadError] = DynamicRadError) -> str:
    """The name of a device, such as cpu or cuda:1, if tensors can be made on it here."""
    import torch

    try:
        if torch.empty(1, device=name, dtype=torch.float32).is_meta:
            raise RuntimeError("meta tensors hold no values")
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0].removesuffix(".")
        raise error(f"device {name!r} can't be used here: {reason}. `dynamicrad doctor` shows what can.") from None
    return name


def pipeline_class(folder: str, task: str, error: type[DynamicRadError] = DynamicRadError) -> Any:
    """diffusers' DiffusionPipeline, if the folder is one of a pipeline; `task` as in `optional`."""
    index = Path(folder, "model_index.json")
    if not index.is_file():
        raise error(f"{folder} is no folder of a diffusers pipeline: there is no model_index.json in it.")
    try:
        json.loads(index.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise error(f"{index} is not valid JSON: {problem}.") from None
    return optional("diffusers", task, "diffusers", error).DiffusionPipeline


def load_pipeline(folder: str, task: str, error: type[DynamicRadError] = DynamicRadError, **settings: Any) -> Any:
    """The pipeline of a local folder; `settings` go to from_pretrained."""
    pipeline = pipeline_class(folder, task, error)
    try:
        return pipeline.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as problem:
        raise error(f"the pipeline in {folder} can't be loaded: {problem}") from None
