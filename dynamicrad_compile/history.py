"""What graphs of the same code have shown before: whether a single frame may be the first of a video."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

from .frames import code_of_compilation
from .passes import Seen

_seen: weakref.WeakKeyDictionary[CodeType, Seen] = weakref.WeakKeyDictionary()


def seen_before() -> Seen:
    """What graphs of the code that Dynamo compiles have shown; the passes add to it."""
    code = code_of_compilation()
    return Seen() if code is None else _seen.setdefault(code, Seen())


def forget_with(run: Callable[..., Any]) -> None:
    """Let what this code has shown be forgotten when Dynamo drops a graph of it."""
    code = code_of_compilation()
    if code is not None:
        weakref.finalize(run, _seen.pop, code, None)
