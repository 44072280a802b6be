"""Which keys a mask lets through, where it is the same for every query.

Recognised, with %m bool [B, 1, 1, S]:

    %m                                       key padding
    %m & %m.transpose(2, 3), however either was expanded    padding of keys and of queries (HunyuanVideo 1.5)

In the second form the rows of padded queries have no key at all, and their output is zero.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from ._graph import hint, value_of

_CASTS = {"bool", "contiguous", "clone"}
_EXPANDS = {"repeat", "expand", "expand_as"}
_TRANSPOSES = {"transpose", "swapaxes", "swapdims"}
_AND = {operator.and_, torch.logical_and, torch.bitwise_and}


class KeyMask(NamedTuple):
    """`keys` yields bool [B or 1, 1, 1, S]; with `rows` the same tokens are masked as queries."""

    keys: fx.Node
    rows: bool


def key_mask(mask: fx.Node) -> KeyMask | None:
    """The keys that a mask lets through for every query; None if it is no such mask."""
    mask = _through_casts(mask)
    if _is_key_padding(mask):
        return KeyMask(mask, rows=False)
    is_and = mask.op == "call_function" and mask.target in _AND
    if not is_and and not (mask.op == "call_method" and mask.target in ("logical_and", "bitwise_and", "__and__")):
        return None
    sides = [_through_casts(side) for side in mask.args if isinstance(side, fx.Node)]
    if len(sides) != 2 or not _is_bool(mask):
        return None
    for one, other in (sides, reversed(sides)):
        keys = _unexpanded(one)
        if keys is not None and _unexpanded(_untransposed(other)) is keys:
            return KeyMask(keys, rows=True)
    return None


def _is_bool(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() == 4


def _is_key_padding(node: fx.Node) -> bool:
    return _is_bool(node) and [hint(n) for n in value_of(node).shape[1:3]] == [1, 1]


def _through_casts(node: fx.Node) -> fx.Node:
    """Past operations that leave a bool tensor as it is."""
    while node.op == "call_method" and node.target in _CASTS and isinstance(node.args[0], fx.Node):
        if not _is_bool(node.args[0]):
            break
        node = node.args[0]
    return node


def _untransposed(node: fx.Node) -> fx.Node | None:
    """What `node` is the transpose of, in its last two dimensions."""
    is_transpose = (node.op == "call_method" and node.target in _TRANSPOSES) or node.target is torch.transpose
    if not is_transpose or len(node.args) != 3:
        return None
    dims = {d % 4 for d in node.args[1:] if isinstance(d, int)}
    source = node.args[0]
    return source if dims == {2, 3} and isinstance(source, fx.Node) else None


def _unexpanded(node: fx.Node | None) -> fx.Node | None:
    """The [B, 1, 1, S] tensor of which `node` is [B, *, *, S] by repetition; itself if it is one."""
    if node is None or not _is_bool(node):
        return None
    node = _through_casts(node)
    if node.op == "call_method" and node.target in _EXPANDS and isinstance(node.args[0], fx.Node):
        inner = node.args[0]
        if _is_bool(inner) and hint(value_of(inner).shape[-1]) == hint(value_of(node).shape[-1]):
            node = inner
    return node if _is_key_padding(node) else None
