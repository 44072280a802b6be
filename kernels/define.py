"""Definition of an op that runs Triton kernels on CUDA, without loading Inductor."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


def define(
    name: str, function: Callable[..., Any], kernels: Sequence[Any] | None, mutates_args: Iterable[str] = ()
) -> torch.library.CustomOpDef:
    """A `torch.library.triton_op` whose function runs `kernels`; a `custom_op` if they are None (no Triton here).

    The compile caches of PyTorch hash the kernels behind an op. `triton_op` looks for them in the source of the
    function, for which it imports Inductor (over a second, at every import of the package), and finds only those that
    are launched by name. So it gets a copy of the function that has no source, and the kernels are entered by hand.
    """
    if kernels is None:
        return torch.library.custom_op(name, function, mutates_args=mutates_args)
    code = function.__code__.replace(co_filename=f"<{name}>")
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    copy.__annotations__ = function.__annotations__
    op = torch.library.triton_op(name, copy, mutates_args=mutates_args)
    known = getattr(torch._library.triton, "triton_ops_to_kernels", None)
    if known is not None:
        known[name] = [kernel for kernel in kernels if hasattr(kernel, "cache_key")]  # not those of the interpreter
    return op
