"""Errors of pydantic in our words: key, value, what is expected, the nearest known key. Imports no torch."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import nearest

MAX_SHOWN = 200  # characters of a value


def problems(
    error: ValidationError,
    model: type[BaseModel],
    noun: str = "",
    elsewhere: Callable[[str], str] = lambda name: "",
) -> list[str]:
    """One line for each problem that pydantic found when it made a `model`.

    Keys are those of a file, `table.key`. With a noun, as in "option", they are names that stand alone, and what is
    expected is left to pydantic's message. `elsewhere` says where an unknown name belongs, if it knows.
    """
    lines = [_problem(model, dict(detail), noun, elsewhere) for detail in error.errors()]
    return list(dict.fromkeys(lines))


def _problem(model: type[BaseModel], detail: dict[str, Any], noun: str, elsewhere: Callable[[str], str]) -> str:
    location = tuple(detail["loc"])[:1] if noun else tuple(detail["loc"])
    key = ".".join(str(part) for part in location) or noun or "the whole"
    if detail["type"] == "extra_forbidden":
        known = _keys(model, location[:-1])
        hint = elsewhere(str(location[-1])) or nearest(str(location[-1]), known)
        if noun:
            return f"unknown {noun} {key!r}.{hint} Known: {', '.join(known)}."
        return f"{key}: unknown key; known here are {known}.{hint}"
    expected = "" if noun else _expected(model, location)
    if detail["type"] == "missing":
        return f"{key}: this key is missing.{expected}"
    value = detail["input"]
    shown = f"a table with {sorted(value)}" if isinstance(value, dict) and not noun else repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    message = str(detail["msg"]).removeprefix("Value error, ").removesuffix(".")
    if detail["type"] == "model_type":
        message = "this is not a table"
    return f"{f'{noun} ' if noun else ''}{key} = {shown}: {message}.{expected}"


def _fields(model: type[BaseModel], location: tuple[Any, ...]) -> list[Any]:
    """The fields along a key path, None where the path leaves the schema."""
    table: Any = model
    fields = []
    for part in location:
        found = None
        if isinstance(table, type) and issubclass(table, BaseModel):
            by_key = {field.alias or name: field for name, field in table.model_fields.items()}
            found = by_key.get(str(part))
        fields.append(found)
        table = None if found is None else _table(found.annotation)
    return fields


def _table(annotation: Any) -> Any:
    """The table of a field that may be left out, else the annotation itself."""
    tables = [item for item in typing.get_args(annotation) if isinstance(item, type) and issubclass(item, BaseModel)]
    return tables[0] if tables else annotation


def _keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys of the table at a key path."""
    table: Any = model
    if location:
        field = _fields(model, location)[-1]
        table = None if field is None else _table(field.annotation)
    if not (isinstance(table, type) and issubclass(table, BaseModel)):
        return []
    return [field.alias or name for name, field in table.model_fields.items() if not field.exclude]


def _expected(model: type[BaseModel], location: tuple[Any, ...]) -> str:
    """' Expected ...' with the type and range of the field at a key path, else an empty string."""
    field = _fields(model, location)[-1] if location else None
    if field is None:
        return ""
    annotation, metadata = _table(field.annotation), list(field.metadata)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f" Expected a table with {_keys(model, location)}."
    if typing.get_origin(annotation) is typing.Literal:
        return f" Expected one of {list(typing.get_args(annotation))}."
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return ""
    low = next((item.ge for item in metadata if hasattr(item, "ge")), None)
    high = next((item.le for item in metadata if hasattr(item, "le")), None)
    kind = {int: "an integer", float: "a number", str: "text"}.get(annotation, "a value")
    if low is not None and high is not None:
        return f" Expected {kind} in {low:g}..{high:g}."
    return f" Expected {kind}." if low is None else f" Expected {kind} of at least {low:g}."
