"""What graphs of the same code have shown before: whether a single frame may be the first of a video."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

from .frames import frame_of
from .passes import Seen

_seen: weakref.WeakKeyDictionary[CodeType, Seen] = weakref.WeakKeyDictionary()


def seen_before() -> Seen:
    """What graphs of the code that Dynamo compiles have shown; the passes add to it."""
    code = _code()
    return Seen() if code is None else _seen.setdefault(code, Seen())


def forget_with(run: Callable[..., Any]) -> None:
    """Let what this code has shown be forgotten when Dynamo drops a graph of it."""
    code = _code()
    if code is not None:
        weakref.finalize(run, _seen.pop, code, None)


def _code() -> CodeType | None:
    frame = frame_of("_compile", "convert_frame.py")
    code = None if frame is None else frame.f_locals.get("code")
    return code if isinstance(code, CodeType) else None
