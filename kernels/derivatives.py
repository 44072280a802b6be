"""What stands above the kernels of an op: its gradient under autograd and torch.func, and the derivatives it refuses.

`torch.library.register_autograd` knows neither torch.func nor forward mode: grad fails there, and tangents are lost in
silence. An `autograd.Function` with a context of its own works under all transforms of torch.func, and a tangent is an
error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from dynamicrad_compile.errors import DerivativeError


class Autograd(NamedTuple):
    """backward(ctx, *grads) and setup(ctx, inputs, output), as for `torch.library.register_autograd`."""

    backward: Callable[..., Any]
    setup: Callable[..., None]


def no_second(name: str) -> Autograd:
    """The gradient of a backward op: an error."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise DerivativeError(
            f"{name} has no second derivative: no autograd formula was registered for its backward. Leave out "
            "create_graph=True (or the outer of two transforms), or use dense attention there."
        )

    return Autograd(backward, lambda ctx, inputs, output: None)


def register(op: Any, name: str, autograd: Autograd | None) -> None:
    """Put the gradient of an op, called `name` in messages, in the place of PyTorch's own; None: it has none."""
    overload = op._opoverload
    function = None if autograd is None else _function(overload, autograd)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if function is not None and _has_tangent(arguments):
            raise DerivativeError(
                f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, forward_ad). "
                "Use reverse mode (torch.func.vjp, grad, jacrev, backward), or dense attention."
            )
        if function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            with enable_single_level_autograd_function():
                return function.apply(keyset, *arguments)
        return _below_autograd(overload, keyset, arguments)

    for key in ("AutogradCPU", "AutogradCUDA"):
        _LIBRARY.impl(overload, kernel, key, with_keyset=True)


_LIBRARY = torch.library.Library("dynamicrad", "IMPL")


def one_by_one(op: Any) -> Callable[..., Any]:
    """The rule of an op for vmap: samples are computed one after the other."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        pairs = list(zip(arguments, in_dims, strict=True))
        results = [op(*(x if d is None else x.select(d, i) for x, d in pairs)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def _below_autograd(overload: Any, keyset: Any, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _function(overload: Any, autograd: Autograd) -> Any:
    """An `autograd.Function` that calls the op below autograd."""
    defaults = [argument.default_value for argument in overload._schema.arguments]

    class Differentiated(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            # A transform around this one must not lose its derivative because autograd is off in here.
            nested = torch._C._are_functorch_transforms_active()
            with torch.set_grad_enabled(nested), forward_ad._set_fwd_grad_enabled(nested):
                result = _below_autograd(overload, keyset, arguments)
            ctx.given = len(arguments)
            autograd.setup(ctx, (*arguments, *defaults[len(arguments) :]), result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *autograd.backward(ctx, *grads)[: ctx.given]

    return Differentiated


def _has_tangent(arguments: tuple[Any, ...]) -> bool:
    if forward_ad._current_level < 0:
        return False
    tensors = (x for x in arguments if isinstance(x, Tensor))
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
