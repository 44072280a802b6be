"""Numbers that a graph computes from numbers alone."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..operators.table import operator_of
from .writes import is_rewritten


def number(value: Any, by: fx.Node | None = None) -> float | None:
    """A constant: a Python number, or a tensor that the graph fills with or computes from such numbers.

    `by` is the node that uses it, and may write over it.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    rule = operator_of(value).number
    return None if rule is None or is_rewritten(value, by) else rule(value, number)
