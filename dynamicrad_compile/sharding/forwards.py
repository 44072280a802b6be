"""What `shard` does at a model's modules: their `forward` is replaced, as a graph of one compiled block shows it too.

PyTorch's hooks would be graphs of their own there.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ShardError
from .attention import ShardedAttention
from .exchange import Shards
from .plans import ShardPlan

Replaced = tuple[nn.Module, "Callable[..., Any] | None"]
"""A module, and what it had for `forward` instead of its class's."""


def cut(block: nn.Module, shards: Shards, plan: ShardPlan, is_first: bool) -> Replaced:
    """Cut a block's arguments: the tokens of the first one, tables and counts of each."""
    places = {name: i for i, name in enumerate(inspect.signature(block.forward).parameters)}
    cuts: list[tuple[str, Callable[[Any], Any]]] = [(plan.tokens, shards.enter)] if is_first else []
    cuts += [(name, functools.partial(_rows, shards, dim)) for name, dim in plan.tables.items() if name in places]
    cuts += [(name, functools.partial(_count, shards)) for name in plan.first if name in places]

    def around(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = list(args)
        for name, one in cuts:
            if name in kwargs:
                kwargs[name] = one(kwargs[name])
            elif places[name] < len(given):
                given[places[name]] = one(given[places[name]])
        return run(*given, **kwargs)

    return _replace(block, around)


def attend(attention: nn.Module, shards: Shards, plan: ShardPlan) -> Replaced:
    """Let the attention of a module be over the rows of all processes."""
    name = type(attention).__name__

    def around(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = ShardedAttention(shards, plan)
        with mode:
            out = run(*args, **kwargs)
        if not mode.calls:
            raise ShardError(
                f"{name} attends without F.scaled_dot_product_attention, so that only this process's tokens would be "
                "attended to: set its attention backend to 'native'"
            )
        return out

    return _replace(attention, around)


def gather(out: nn.Module, shards: Shards) -> Replaced:
    """Let a module's output be the rows of all processes."""
    return _replace(out, lambda run, args, kwargs: shards.gather(run(*args, **kwargs)))


def restore(module: nn.Module, before: Callable[..., Any] | None) -> None:
    """Give a module back its `forward`."""
    del module.forward
    if before is not None:
        module.forward = before


def _replace(module: nn.Module, around: Callable[..., Any]) -> Replaced:
    """Replace `forward` by `around(forward, args, kwargs)`; a deep copy of the module runs its own `forward`."""
    before, forward = module.__dict__.get("forward"), type(module).forward

    @functools.wraps(module.forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(forward, self) if before is None else before, args, kwargs)

    module.forward = types.MethodType(replaced, module)
    return module, before


def _rows(shards: Shards, dim: int, table: Any) -> Any:
    """This process's rows of a table, or of each of some."""
    if isinstance(table, (tuple, list)):
        return tuple(_rows(shards, dim, one) for one in table)
    return None if table is None else shards.cut(table, dim)


def _count(shards: Shards, count: int | None) -> int | None:
    """How many of the first `count` rows this process has."""
    return None if count is None else max(0, min(count - shards.start, shards.local))
