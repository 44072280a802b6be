"""How the ops are defined: one schema from the fields of their arguments, one path for CUDA and one for the CPU.

CUDA tensors run Triton kernels through a `triton_op`, so that Inductor and AOTInductor see the kernels themselves.
CPU tensors run eager code, which those compilers see as the opaque op with `_cpu` at the end of its name. Nothing
on the way synchronises a CUDA device with the host.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynamicrad_compile.errors import PlanError

from . import derivatives
from .derivatives import Autograd

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
"""Whether kernels can be launched; modules of ops import theirs only if so."""


def parameters_of(fields: Any) -> list[inspect.Parameter]:
    """The fields of a NamedTuple as parameters of a function."""
    types, defaults = typing.get_type_hints(fields), fields._field_defaults
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [
        inspect.Parameter(name, kind, annotation=types[name], default=defaults.get(name, inspect.Parameter.empty))
        for name in fields._fields
    ]


def signed(function: Callable[..., Any], parameters: Sequence[inspect.Parameter], returns: Any) -> Callable[..., Any]:
    """`function` of *arguments with the signature from which PyTorch infers the schema."""
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return function


def _without_source(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of a function whose source can't be found.

    `triton_op` looks for kernels in the source of its function, for which it imports Inductor (over a second, at every
    import of the package), and finds only those that are launched by name.
    """
    code = function.__code__.replace(co_filename=f"<{name}>")
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def define(
    name: str,
    parameters: Sequence[inspect.Parameter],
    returns: Any,
    *,
    cuda: Callable[..., Any],
    kernels: Sequence[Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Autograd | None = None,
    mutates: Iterable[str] = (),
) -> None:
    """Define `dynamicrad::NAME` and `dynamicrad::NAME_cpu`; the underscore of an op that mutates stays last.

    cuda, cpu, fake take the arguments in the order of `parameters`; the first one is a tensor that tells the device.
    kernels: the Triton kernels that `cuda` launches, for the compile caches of PyTorch, which hash them.
    """
    stem = name.rstrip("_")
    suffix = name[len(stem) :]
    on_cpu = signed(lambda *arguments: cpu(*arguments), parameters, returns)
    opaque = torch.library.custom_op(f"dynamicrad::{stem}_cpu{suffix}", on_cpu, mutates_args=mutates)

    def run(*arguments: Any) -> Any:
        device = arguments[0].device
        if device.type == "cpu":
            return opaque(*arguments)
        if device.type != "cuda":
            raise PlanError(f"{stem} runs on cpu and cuda tensors, got {device}.")
        if not HAS_TRITON:
            raise PlanError(f"{stem} needs Triton for CUDA tensors. Install triton.")
        return cuda(*arguments)

    make = torch.library.triton_op if HAS_TRITON else torch.library.custom_op
    run = signed(_without_source(run, name), parameters, returns)
    op = make(f"dynamicrad::{name}", run, mutates_args=mutates)
    known = getattr(torch._library.triton, "triton_ops_to_kernels", None)
    if known is not None:
        # Those of the interpreter have no key.
        known[f"dynamicrad::{name}"] = [kernel for kernel in kernels if hasattr(kernel, "cache_key")]
    op.register_kernel("cpu")(on_cpu)  # saves eager code the second dispatch
    for definition in (op, opaque):
        definition.register_fake(fake)
        derivatives.register(definition, name, autograd)
        if not mutates:
            definition.register_vmap(derivatives.one_by_one(definition))


PAIR = tuple[Tensor, Tensor]
"""The annotation of ops that return two tensors."""
