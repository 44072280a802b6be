"""In which order a transposition takes the dimensions of its operand, read from a node."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..names import argument


def permute(node: fx.Node, rank: int) -> list[int]:
    """All dimensions, as one argument or as several."""
    given: Any = node.args[1] if len(node.args) == 2 else node.args[1:] or node.kwargs.get("dims")
    return [d % rank for d in given]


def transpose(node: fx.Node, rank: int) -> list[int]:
    """Two dimensions exchanged."""
    return _exchanged(rank, argument(node, 1, "dim0"), argument(node, 2, "dim1"))


def matrix(node: fx.Node, rank: int) -> list[int]:
    """The last two dimensions exchanged."""
    return _exchanged(rank, -2, -1) if rank > 1 else list(range(rank))


def _exchanged(rank: int, a: int, b: int) -> list[int]:
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order
