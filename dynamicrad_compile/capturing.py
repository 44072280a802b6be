"""Dynamo's settings while it captures for this backend, and for no other.

Numbers that a model puts into a tensor and reads back stay known, such as the grid of its latents for RoPE
(`torch.tensor(x.shape[2:])`, later `.tolist()`): Dynamo forgets those of tensors with more than one number, and breaks
the graph where they are read. They are known for one resolution, so code that reads such tensors is compiled for each;
made symbolic, it would break again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import fx

from .frames import code_of_compilation, frame_of

CAPTURE = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
"""Settings under which sizes that depend on data do not break the graph (Mochi, HunyuanVideo 1.5, FramePack)."""

MAX_NUMBERS = 64
"""Tensors with so many numbers that are known stay known: the grids of twenty samples."""

_settings = contextlib.ExitStack()
_backends: list[Callable[..., Any]] = []
_of_one_size: weakref.WeakSet[CodeType] = weakref.WeakSet()


class _Callbacks(list[Callable[..., Any]]):
    """Callbacks of Dynamo, of which the first is ours and stays: `torch._dynamo.reset` forgets all others."""

    def clear(self) -> None:
        del self[1:]


def captures_data_dependent(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend, for which Dynamo captures under `capturing` from now on.

    torch.compile loads a backend by its name before anything is captured, and calls it no earlier than with a graph.
    """
    from torch._dynamo.callback import callback_handler

    if not _backends:
        callback_handler.start_callbacks = _Callbacks([_start, *callback_handler.start_callbacks])
        callback_handler.end_callbacks = _Callbacks([_end, *callback_handler.end_callbacks])
    _backends.append(backend)
    return backend


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """While it is open, Dynamo captures as it does for this backend."""
    from torch._subclasses import fake_tensor

    usual = getattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", None)
    with torch._dynamo.config.patch(CAPTURE):
        if usual is None:
            yield
            return
        fake_tensor.CONSTANT_NUMEL_LIMIT = max(usual, MAX_NUMBERS)
        try:
            yield
        finally:
            fake_tensor.CONSTANT_NUMEL_LIMIT = usual


def keep_sizes_constant(gm: fx.GraphModule) -> None:
    """Note it where the code of a graph has read known sizes out of tensors: its next graph is for one size, too."""
    code = code_of_compilation()
    if code is not None and reads_known_sizes(gm.graph):
        _of_one_size.add(code)


def reads_known_sizes(graph: fx.Graph) -> bool:
    """Whether sizes of a tensor were put into one of which no other was made: Python must have read them there."""
    known: set[fx.Node] = set()
    shapes: set[tuple[int, ...]] = set()
    for node in graph.nodes:
        value, inputs = node.meta.get("example_value"), node.all_input_nodes
        if known.issuperset(inputs) if inputs else node.target is torch.tensor:
            known.add(node)
        elif node.op != "placeholder" and isinstance(value, torch.Tensor):  # weights have the sizes of patches
            shapes.update([tuple(value.shape)] if all(type(size) is int for size in value.shape) else [])
    sizes = [node.args[0] for node in known if node.target is torch.tensor and known.issuperset(node.users)]
    return any(_are_sizes(given, shape) for given in sizes for shape in shapes)


def _are_sizes(given: Any, shape: tuple[int, ...]) -> bool:
    """Whether numbers given to torch.tensor, two of them larger than 1, are some of a shape that follow each other."""
    if not isinstance(given, (tuple, list)) or sum(isinstance(n, int) and n > 1 for n in given) < 2:
        return False
    return any(tuple(given) == shape[d : d + len(given)] for d in range(len(shape)))


def _start(*_: Any) -> None:
    if _is_for_us():
        _settings.enter_context(capturing())
        if code_of_compilation() in _of_one_size:
            _settings.enter_context(torch._dynamo.config.patch(automatic_dynamic_shapes=False))


def _end(*_: Any) -> None:
    _settings.close()


def _is_for_us() -> bool:
    """Whether the compilation that begins is for this backend; Dynamo has it in wrappers of its own."""
    frame = frame_of("_compile", "convert_frame.py")
    backend = None if frame is None else frame.f_locals.get("compiler_fn")
    while backend is not None and backend not in _backends:
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return backend is not None
