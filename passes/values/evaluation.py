"""Evaluation: PyTorch's own operators on tensors of runs, whatever an author calls them by.

The mode sees primitive operators. An elementwise one works on values that are cut alike; what moves, repeats, cuts and
joins has a rule; anything else works on all elements where these are few. A write into a view is a write into what it
shows rows of; other views of that are then known to be old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import shapes
from .runs import Runs, UnknownValueError, aligned, coarse, elements, filled, in_rows, runs_of


class Evaluation(TorchDispatchMode):
    """Inside, operators take and give `Runs`. Raises UnknownValueError, or what PyTorch raises.

    few  the operation at hand gives so few elements that it may have no rule
    """

    few = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnknownValueError(f"{func} depends on chance")
        args, kwargs = tree_map(_as_runs, (args, kwargs))
        tensors = [x for x in tree_leaves(args) if isinstance(x, Runs)]
        if any(x.writes != x.root.writes for x in tensors):
            raise UnknownValueError("a view of what was written since")
        writes, name = func._schema.is_mutable, func._schema.name.removeprefix("aten::")
        if writes and any(isinstance(x, Runs) for x in tree_leaves(kwargs)):
            raise UnknownValueError(f"{func} writes its result somewhere")
        if name.rstrip("_") in _ELEMENTWISE or (torch.Tag.pointwise in func.tags and tensors):
            result = _elementwise(func, args, kwargs, writes)
        elif name in _RULES:
            result = _RULES[name](*args, **kwargs)
        else:
            result = self._on_elements(func, args, kwargs)
        if writes:
            args[0].root.writes += 1
            _write(args[0], result)
            return args[0]
        if tensors and any(r.alias_info is not None for r in func._schema.returns):
            for shown in result if isinstance(result, (list, tuple)) else [result]:
                shown.shows = (tensors[0], *_rows_shown(name, tensors[0], *args[1:]))
                shown.writes = shown.root.writes
        return result

    def _on_elements(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self.few or func._schema.is_mutable:
            raise UnknownValueError(f"no rule for {func}")
        args, kwargs = tree_map(lambda x: elements(x) if isinstance(x, Runs) else x, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return tree_map(_as_runs, func(*args, **kwargs))


def _as_runs(x: Any) -> Any:
    return runs_of(x) if isinstance(x, torch.Tensor) and not isinstance(x, Runs) else x


def _elementwise(func: Any, args: Any, kwargs: Any, writes: bool) -> Runs:
    """An elementwise operation, also one that writes its result, on a copy of what it writes into."""
    operands, ends = aligned([x for x in args if isinstance(x, Runs)])
    if writes:
        operands[0] = operands[0].broadcast_to([len(end) for end in ends]).clone()
    values = iter(operands)
    return coarse(func(*(next(values) if isinstance(x, Runs) else x for x in args), **kwargs), ends)


def _write(target: Runs, new: Runs) -> None:
    """Put other values into a tensor, and into what it shows rows of."""
    if target.shape != new.shape:
        raise UnknownValueError("a write of another shape")
    target.values, target.ends, target.writes = new.values, new.ends, target.root.writes
    if target.shows is None:
        return
    base, dim, start, stop = target.shows
    if dim < 0:
        raise UnknownValueError("a write into a view that is not followed")
    rows = new if new.dim() == base.dim() else shapes.unsqueeze(new, dim)
    pieces = [shapes.slice_(base, dim, 0, start), rows, shapes.slice_(base, dim, stop, base.shape[dim])]
    _write(base, shapes.cat([piece for piece in pieces if piece.shape[dim]], dim))


def _rows_shown(name: str, base: Runs, *args: Any) -> tuple[int, int, int]:
    """Which rows a view shows: (dim, start, stop); dim -1 where that is not followed."""
    if name in ("alias", "detach") and base.dim():
        return 0, 0, base.shape[0]
    if name == "select":
        at = args[1] % base.shape[args[0]]
        return args[0] % base.dim(), at, at + 1
    if name == "slice" and (args[3:] or (1,))[0] == 1:
        dim = (args or (0,))[0]
        return (dim % base.dim(), *shapes.bounds(base.shape[dim], *args[1:3]))
    return -1, 0, 0


def _to_copy(x: Runs, dtype: torch.dtype | None = None, **kwargs: Any) -> Runs:
    return coarse(x.values.to(dtype or x.dtype), x.ends)


def _index(x: Runs, indices: Sequence[Runs | None]) -> Runs:
    """Elements by one index a dimension, which are broadcast together; else by whatever PyTorch allows."""
    given = [i for i in indices if i is not None and i.dtype != torch.bool]
    if len(given) < x.dim():
        return runs_of(elements(x)[tuple(slice(None) if i is None else elements(i) for i in indices)])
    values, ends = aligned(given)
    return coarse(elements(x)[tuple(values)], ends)


def _index_select(x: Runs, dim: int, index: Runs) -> Runs:
    dim %= x.dim()
    x = in_rows(x, dim)
    return coarse(x.values.index_select(dim, index.values), [*x.ends[:dim], *index.ends, *x.ends[dim + 1 :]])


def _made(value: Any) -> Callable[..., Runs]:
    def make(shape: Sequence[int], fill: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Runs:
        plain = torch.get_default_dtype() if fill is None else None
        return filled(shape, value if fill is None else fill, dtype or plain)

    return make


def _new(value: Any) -> Callable[..., Runs]:
    def make(x: Runs, shape: Sequence[int], fill: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Runs:
        return filled(shape, value if fill is None else fill, dtype or x.dtype)

    return make


def _like(value: Any) -> Callable[..., Runs]:
    def make(x: Runs, fill: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Runs:
        return filled(x.shape, value if fill is None else fill, dtype or x.dtype)

    return make


_FILLED = {"zeros": 0, "ones": 1, "empty": 0, "full": 0}  # what is in an empty one is nobody's business
_ELEMENTWISE = {  # besides those that torch says are
    "copy", "fill", "zero", "masked_fill", "floor_divide", "__or", "__and", "__xor", "__ior", "__iand", "__ixor",
}  # fmt: skip
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), shapes.view),
    **dict.fromkeys(("alias", "detach", "clone", "lift", "lift_fresh", "lift_fresh_copy"), shapes.same),
    "_to_copy": _to_copy, "expand": shapes.expand, "repeat": shapes.repeat, "permute": shapes.permute,
    "transpose": shapes.transpose, "t": shapes.t, "unsqueeze": shapes.unsqueeze, "squeeze": shapes.squeeze,
    "slice": shapes.slice_, "select": shapes.select, "cat": shapes.cat, "stack": shapes.stack,
    "constant_pad_nd": shapes.pad, "index": _index, "index_select": _index_select,
    **{name: _made(value) for name, value in _FILLED.items()},
    **{f"new_{name}": _new(value) for name, value in _FILLED.items()},
    **{f"{name}_like": _like(value) for name, value in _FILLED.items()},
}  # fmt: skip
