"""A batch size that stays open: which inputs have one, and an example call from which torch.export can tell it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ExportError, nearest

MAX_BATCH = 1024


def with_dynamic_batch(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], which: bool | Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """(args, kwargs, dynamic_shapes) of torch.export for a call whose batch size is open.

    which: True for every tensor of the call that has as many rows as the first, or the names of the tensors. A batch
    of one is doubled, because torch.export takes a size of 1 for a constant.
    Raises ExportError if a name is no tensor of the call, or if they disagree.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(f"the call does not fit {type(model).__name__}.forward: {error}.") from None
    given = dict(bound.arguments)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.dim()}
    names = _names(tensors, which)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    double = tensors[names[0]].shape[0] == 1
    shapes: dict[str, Any] = {}
    for name, value in given.items():
        if name not in names:
            shapes[name] = torch.utils._pytree.tree_map(lambda _: None, value)
            continue
        shapes[name] = {0: batch}
        if double:
            given[name] = torch.cat([value, value])
    positional = list(bound.arguments)[: len(args)]
    rest = {name: value for name, value in given.items() if name not in positional}
    return tuple(given[name] for name in positional), rest, shapes


def _names(tensors: dict[str, torch.Tensor], which: bool | Sequence[str]) -> list[str]:
    if not tensors:
        raise ExportError("dynamic_batch needs a tensor among the inputs.")
    if which is True:
        size = next(iter(tensors.values())).shape[0]
        return [name for name, value in tensors.items() if value.shape[0] == size]
    names = [which] if isinstance(which, str) else list(which)  # type: ignore[arg-type]
    for name in names:
        if name not in tensors:
            known = ", ".join(tensors)
            raise ExportError(
                f"dynamic_batch names {name!r}, which is no tensor of the call.{nearest(name, tensors)} "
                f"Tensors: {known}."
            )
    sizes = {name: tensors[name].shape[0] for name in names}
    if len(set(sizes.values())) != 1:
        raise ExportError(f"the inputs of dynamic_batch must have one batch size, got {sizes}.")
    return names
