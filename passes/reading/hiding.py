"""Float masks that only hide keys: whether the graph shows that one is 0 at keys to attend, else very negative."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..operators.names import op_name, tensor_value
from ..operators.table import operator_of
from .numbers import number
from .writes import is_rewritten

HIDDEN = -1e4
"""A score lowered by this much or more has weight 0 in every dtype (exp(-104) is 0 in float32)."""


def shows_hiding(mask: Any) -> bool:
    """Whether the graph shows that a float mask is 0 where a key is attended and HIDDEN or less elsewhere."""
    return isinstance(mask, fx.Node) and _Hiding(mask, depth=16).shown()


class _Hiding:
    """One step of the walk back through the nodes that make a float mask.

    node    made a part of the mask
    depth   how many steps may still be taken
    by      the node that uses it, and may write over it
    """

    def __init__(self, node: fx.Node, depth: int, by: fx.Node | None = None):
        self.node = node
        self.depth = depth
        self.by = by

    def shown(self) -> bool:
        """Whether the node is 0 where a key is attended and HIDDEN or less elsewhere."""
        if self.depth == 0 or is_rewritten(self.node, but_by=self.by):
            return False
        entry = operator_of(self.node)
        if entry.carries_mask and not entry.negates:
            return self._inner(self.node.args[0])
        return entry.hides is not None and entry.hides(self)

    def _inner(self, value: Any) -> bool:
        below = tensor_value(value)
        floats = below is not None and below.is_floating_point()
        return floats and _Hiding(value, self.depth - 1, by=self.node).shown()

    def hides(self, value: Any) -> bool:
        """Whether a value is 0 where a key is attended and HIDDEN or less elsewhere."""
        return self.is_level(value) or self._inner(value)

    def is_level(self, value: Any) -> bool:
        """Whether a value is the number 0, or a number low enough to hide a key."""
        constant = number(value, self.node)
        return constant is not None and (constant == 0 or constant <= HIDDEN)

    def is_scaled_flag(self, flag: Any, factor: Any) -> bool:
        """Whether a value is 0 or 1, and a factor a number low enough to hide a key."""
        low = number(factor)
        return low is not None and low <= HIDDEN and _is_flag(flag)


def _is_flag(node: Any, depth: int = 8) -> bool:
    """Whether a float is 0 or 1: a bool that was cast, or 1 minus one."""
    if not isinstance(node, fx.Node) or depth == 0 or is_rewritten(node):
        return False
    value, name = tensor_value(node), op_name(node)
    if value is not None and value.dtype == torch.bool:
        return True
    if name == "rsub" or (name == "sub" and number(node.args[0]) == 1):
        return number(node.args[0 if name == "sub" else 1]) == 1 and _is_flag(node.args[1 if name == "sub" else 0])
    entry = operator_of(node)
    return entry.carries_mask and not entry.negates and _is_flag(node.args[0], depth - 1)
