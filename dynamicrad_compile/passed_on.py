"""Errors of ours that Dynamo passes on in our words: of our class, our message first, without its own frames."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .errors import DynamicRadError


def passes_on(backend: Callable[..., Any]) -> Callable[..., Any]:
    """A backend of torch.compile whose DynamicRadErrors reach the caller of the compiled model as what they are.

    Dynamo would wrap them in its BackendCompilerFailed. What is raised is both: it is caught as either, its
    `inner_exception` is the error itself.
    """

    @functools.wraps(backend)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return backend(*args, **kwargs)
        except DynamicRadError as error:
            raise _passed_on(type(error))(backend, error, None) from error.__cause__

    return checked


def _passed_on(kind: type[DynamicRadError]) -> type[Any]:
    """A class that is `kind`, in name too, and that Dynamo takes for its own."""
    from torch._dynamo.exc import BackendCompilerFailed

    class PassedOn(kind, BackendCompilerFailed):  # type: ignore[valid-type, misc]
        __init__ = BackendCompilerFailed.__init__

        def __str__(self) -> str:
            return str(self.inner_exception)

        def __reduce__(self) -> tuple[Any, ...]:
            return kind, (str(self),)

        def remove_dynamo_frames(self) -> Any:
            return self.with_traceback(None)

    PassedOn.__name__, PassedOn.__qualname__, PassedOn.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return PassedOn
