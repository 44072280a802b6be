"""Float masks that are 0 where a key is attended and very negative elsewhere: what the graph shows of them."""

from __future__ import annotations

from ..calls import Hiding
from ..names import argument


def masked_fill(walk: Hiding) -> bool:
    """Such a mask, with more keys hidden."""
    return walk.hides(walk.node.args[0]) and walk.is_level(argument(walk.node, 2, "value"))


def where(walk: Hiding) -> bool:
    """Each element from one of two."""
    args = walk.node.args
    return len(args) == 3 and walk.hides(args[1]) and walk.hides(args[2])


def combined(walk: Hiding) -> bool:
    """Hidden by one mask or by the other."""
    args = walk.node.args
    return walk.hides(args[0]) and walk.hides(args[1]) and not walk.node.kwargs


def scaled(walk: Hiding) -> bool:
    """A flag, 0 or 1, times a very negative number."""
    one, other = walk.node.args[:2]
    return walk.is_scaled_flag(one, other) or walk.is_scaled_flag(other, one)
