"""Files: read as TOML, written as TOML, written whole or not at all. Imports no torch."""

from __future__ import annotations

import datetime
import json
import numbers
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["to_toml", "toml_value", "tomllib", "whole_file", "whole_folder", "write_file"]


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a file to write, which takes the place of `path` at the end; nothing does if an error is raised.

    It lies beside the target, so that moving is renaming, and has its ending. Missing folders are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.partial.{target.name}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file (text as UTF-8) at once or not at all; returns its path."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def whole_folder(folder: Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder; its files move to `folder` at the end, and nothing does if an error is raised.

    It lies beside the target, so that moving is renaming. Files of the same names are replaced; those whose endings
    are in `last`, because they refer to the others, come last.
    """
    missing = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=parent))
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.suffix in last):
            os.replace(file, folder / file.name)
        missing = []
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for place in missing:  # folders made for nothing, the innermost first
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()


def to_toml(tables: Mapping[str, Any]) -> str:
    """TOML of nested tables of numbers, texts, dates, and lists of these. Plain values of a table come first.

    A list of tables is an array of tables; tables within other lists are written inline.
    """
    lines: list[str] = []

    def write(table: Mapping[str, Any], path: tuple[str, ...], mark: str = "[{}]") -> None:
        deep = {key: value for key, value in table.items() if isinstance(value, Mapping) or _are_tables(value)}
        plain = {key: value for key, value in table.items() if key not in deep}
        if path and (plain or not table or mark != "[{}]"):
            lines.extend([""] * bool(lines) + [mark.format(".".join(map(_key, path)))])
        lines.extend(f"{_key(key)} = {toml_value(value)}" for key, value in plain.items())
        for key, value in deep.items():
            if isinstance(value, Mapping):
                write(value, (*path, key))
                continue
            for item in value:
                write(item, (*path, key), "[[{}]]")

    write(tables, ())
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """One value as TOML, tables inline. Raises TypeError for a type that TOML lacks."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(str(key))} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if not isinstance(value, numbers.Real):
        raise TypeError(f"TOML has no {type(value).__name__}: {value!r}.")
    text = repr(float(value))
    return text if any(mark in text for mark in ".en") else f"{text}.0"


def _key(key: str) -> str:
    plain = key.replace("-", "").replace("_", "")
    return key if plain.isalnum() and key.isascii() else json.dumps(key)


def _are_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, Mapping) for item in value)
