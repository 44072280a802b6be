"""Whose call it is: the model, layer or object whose code calls a compiled graph.

Dynamo calls one graph for all modules of equal code, so a graph cannot know which of them it runs for; the Python frame
that calls it does. Weights are no sign: offloading and sharding give a model other tensors at every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from ..frames import TORCH


class Ref(weakref.ref[Any]):
    """A weak reference that is hashed and compared by identity: what it refers to may be compared by value."""

    __slots__ = ("number",)
    number: int

    def __new__(cls, value: Any) -> Ref:
        made = super().__new__(cls, value)
        made.number = id(value)
        return made

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Ref) and self.number == other.number and self() is other())


Owner = tuple[Ref, ...]
"""The modules that a function was called with, or the object whose method it is; () for a function without any."""


def owner_of(frame: FrameType | None) -> Owner:
    """The owner of a graph's call, from the frame that calls it: its first caller that holds a module, in PyTorch or
    just outside."""
    while frame is not None:
        values = list(_given(frame))
        modules = [value for value in values if isinstance(value, torch.nn.Module) and not _is_made_by_torch(value)]
        if modules:
            return tuple(map(Ref, modules))
        if not _is_internal(frame):
            return _object(values[:1])
        frame = frame.f_back
    return ()


def code_of(frame: FrameType) -> tuple[str, int]:
    """File and first line of the function that calls a graph; it may be one of PyTorch's."""
    code, outer = frame.f_code, frame
    while _is_internal(outer) and outer.f_back is not None:
        outer = outer.f_back
        code = outer.f_code
    return code.co_filename, code.co_firstlineno


def alive(owner: Owner) -> list[Any]:
    """The objects of an owner, without those that are gone."""
    return [value for ref in owner if (value := ref()) is not None]


def _given(frame: FrameType) -> Iterator[Any]:
    """Values of a frame's arguments, then of what its function closes over."""
    code, values = frame.f_code, frame.f_locals
    for name in (*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *code.co_freevars):
        if name in values:
            yield values[name]


def _is_made_by_torch(module: torch.nn.Module) -> bool:
    """Whether a module is a captured graph or a wrapper, and no user's."""
    return isinstance(module, torch.fx.GraphModule) or type(module).__module__.startswith(("torch._dynamo", "torch.fx"))


def _is_internal(frame: FrameType) -> bool:
    """Whether a frame is PyTorch's, or the rest of a function behind a graph break, which its first part calls."""
    code = frame.f_code
    return code.co_filename.startswith((TORCH, "<")) or code.co_name.startswith("torch_dynamo_resume_in")


def _object(first: list[Any]) -> Owner:
    """The object that a method belongs to."""
    if not first or isinstance(first[0], torch.Tensor) or not hasattr(first[0], "__dict__"):
        return ()
    try:
        return (Ref(first[0]),)
    except TypeError:
        return ()
