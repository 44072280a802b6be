"""Dynamo's settings while it captures for this backend, and for no other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from .frames import frame_of

CAPTURE = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
"""Settings under which sizes that depend on data do not break the graph (Mochi, HunyuanVideo 1.5, FramePack)."""

_settings = contextlib.ExitStack()
_backends: list[Callable[..., Any]] = []


class _Callbacks(list[Callable[..., Any]]):
    """Callbacks of Dynamo, of which the first is ours and stays: `torch._dynamo.reset` forgets all others."""

    def clear(self) -> None:
        del self[1:]


def captures_data_dependent(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend, for which Dynamo captures under CAPTURE from now on.

    torch.compile loads a backend by its name before anything is captured, and calls it no earlier than with a graph.
    """
    from torch._dynamo.callback import callback_handler

    if not _backends:
        callback_handler.start_callbacks = _Callbacks([_start, *callback_handler.start_callbacks])
        callback_handler.end_callbacks = _Callbacks([_end, *callback_handler.end_callbacks])
    _backends.append(backend)
    return backend


def _start(*_: Any) -> None:
    if _is_for_us():
        _settings.enter_context(torch._dynamo.config.patch(CAPTURE))


def _end(*_: Any) -> None:
    _settings.close()


def _is_for_us() -> bool:
    """Whether the compilation that begins is for this backend; Dynamo has it in wrappers of its own."""
    frame = frame_of("_compile", "convert_frame.py")
    backend = None if frame is None else frame.f_locals.get("compiler_fn")
    while backend is not None and backend not in _backends:
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return backend is not None
