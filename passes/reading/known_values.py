"""Tensors that a graph makes of numbers alone: a mask over frames, the starts of packed sequences.

The nodes that a tensor comes from are run again, in order, with what is written in place, on tensors of runs (see
values/runs.py). What depends on an input's values is not known; an input's shape, dtype or device is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ..graph import depends_on_data, hint, value_of
from ..operators.names import op_name, operand
from ..operators.table import operator_of
from ..values.evaluation import Evaluation
from ..values.runs import MAX_VALUES, Runs, UnknownValueError, elements, filled
from .writes import is_mutating, is_rewritten, may_write_to

_NOTHING_READ = {f"{name}_like" for name in ("zeros", "ones", "full", "empty")} | {
    f"new_{name}" for name in ("zeros", "ones", "full", "empty", "tensor")
}
_FIRST_READ = {"cast", "expand", "view", "reshape"}
"""Operators that take the shape or dtype of a tensor, and not what it holds."""


log = logging.getLogger("dynamicrad_compile")

MAX_INTEGERS = 4096


class Known(NamedTuple):
    """What a tensor holds, None where that is not known; the symbolic sizes that it rests on, at their hints."""

    value: Runs | None = None
    sizes: tuple[torch.SymInt, ...] = ()


class KnownValues:
    """What the tensors of one graph hold where that follows from numbers."""

    def __init__(self) -> None:
        self._found: dict[fx.Node, Known] = {}

    def of(self, node: fx.Node, by: fx.Node) -> Known:
        """What a tensor holds when the node `by` uses it."""
        if node in self._found:
            return self._found[node]
        run, found = _Run(), Known()
        try:
            needed = _needed(node)
        except UnknownValueError:
            return self._found.setdefault(node, found)
        try:
            with _disable_current_modes():
                found = Known(run.run(sorted(n for n in needed if n < by), node), tuple(run.sizes.values()))
        except Exception:  # any operation may refuse tensors of runs
            log.debug("%s is not known", node.name, exc_info=True)
        return found if any(map(is_mutating, needed)) else self._found.setdefault(node, found)


def integers(node: Any, by: fx.Node) -> list[int] | None:
    """Values of a one-dimensional tensor of integers that depends on no input and no symbol; None for another."""
    if not isinstance(node, fx.Node):
        return None
    value, sizes = KnownValues().of(node, by)
    if value is None or sizes or value.dim() != 1 or value.is_floating_point() or len(value) > MAX_INTEGERS:
        return None
    with _disable_current_modes():
        return [int(x) for x in elements(value).tolist()]


def _needed(node: fx.Node) -> set[fx.Node]:
    """The nodes that have to be run for a tensor. Raises UnknownValueError where it depends on an input's values."""
    todo, seen = [node], {node}
    while todo:
        n = todo.pop()
        name = op_name(n)
        if n.op not in ("call_function", "call_method") or not name or "::" in name:
            raise UnknownValueError(f"it depends on {n.name}")  # an input, or no operation of torch's own
        for other in (*_read(n), *filter(functools.partial(_writes, n), n.users)):
            if other not in seen and not _is_number(other):
                seen.add(other)
                todo.append(other)
    return seen


def _writes(node: fx.Node, user: fx.Node) -> bool:
    """Whether a user of a node writes over its tensor, or makes a view that is written over."""
    return (is_mutating(user) and may_write_to(user, node)) or (operator_of(user).view and is_rewritten(user))


def _read(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose values an operation reads."""
    name = op_name(node)
    if name in _NOTHING_READ:
        return
    if name in _FIRST_READ:
        first = operand(node)
        if isinstance(first, fx.Node):
            yield first
        return
    yield from node.all_input_nodes


def _is_number(node: fx.Node) -> bool:
    """Whether a node is a size, or sizes."""
    value = value_of(node)
    return value is not None and not any(isinstance(x, torch.Tensor) for x in tree_leaves(value))


class _Run:
    """One run of some nodes; sizes: the symbolic sizes that it has met."""

    def __init__(self) -> None:
        self.sizes: dict[str, torch.SymInt] = {}
        self.values: dict[fx.Node, Any] = {}

    def run(self, nodes: list[fx.Node], wanted: fx.Node) -> Runs:
        """What one of the nodes holds behind the last of them."""
        with Evaluation() as mode:
            for node in nodes:
                tensors = [x for x in tree_leaves(value_of(node)) if isinstance(x, torch.Tensor)]
                mode.few = sum(self._size(x.numel()) for x in tensors) <= MAX_VALUES
                self.values[node] = self._call(node)
            result, recorded = self.values[wanted], value_of(wanted)
            if not isinstance(result, Runs) or result.writes != result.root.writes:
                raise UnknownValueError("no tensor, or one that was written since")
        if list(result.shape) != [hint(n) for n in recorded.shape] or result.dtype != recorded.dtype:
            raise UnknownValueError("another tensor than the graph's")
        return result

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = (fx.node.map_aggregate(x, self._value) for x in (node.args, node.kwargs))
        kwargs = {name: torch.device("cpu") if name == "device" else x for name, x in kwargs.items()}
        if any(isinstance(x, str) for x in args[1:]):  # `x.to("cuda")`
            args = tuple(torch.device("cpu") if isinstance(x, str) else x for x in args)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _value(self, given: Any) -> Any:
        """An argument: what a node that was run gave, a size, or a tensor of which nothing is read but its shape."""
        if isinstance(given, torch.device):
            return torch.device("cpu")
        if isinstance(given, torch.SymInt):
            return self._size(given)
        if not isinstance(given, fx.Node):
            return given
        if given in self.values:
            return self.values[given]
        return tree_map(self._plain, value_of(given))

    def _plain(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, torch.Tensor):
            return filled([self._size(n) for n in value.shape], 0, value.dtype)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise UnknownValueError("a number that may change")
        return value

    def _size(self, size: Any) -> int:
        """A size as a number, noted where it is symbolic."""
        if isinstance(size, torch.SymInt):
            if depends_on_data(size):
                raise UnknownValueError("a size that depends on data")
            if size.node.expr.free_symbols:
                self.sizes[str(size)] = size
        return hint(size)
