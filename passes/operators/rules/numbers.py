"""The number that a node fills its result with, where the graph computes it from numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..calls import NumberRule
from ..names import argument, operand, tensor_value

Of = Callable[[Any], float | None]


def always(value: float) -> NumberRule:
    """A constant, as in zeros and ones."""
    return lambda node, of: value


def fill(at: int) -> NumberRule:
    """The argument `fill_value`, by position `at` or by name."""
    return lambda node, of: of(argument(node, at, "fill_value"))


def kept(node: fx.Node, of: Of) -> float | None:
    """The number of its operand."""
    return of(operand(node))


def cast(node: fx.Node, of: Of) -> float | None:
    """The number of its operand, unless it is rounded."""
    return of(operand(node)) if getattr(tensor_value(node), "is_floating_point", bool)() else None


def function(of_numbers: Callable[..., float]) -> NumberRule:
    """A function of the numbers of all arguments."""

    def rule(node: fx.Node, of: Of) -> float | None:
        numbers = [of(x) for x in node.args]
        return float(of_numbers(*numbers)) if None not in numbers else None

    return rule
