"""Masks that hide padded tokens both as keys and as queries (HunyuanVideo 1.5):

    %a = %keys expanded to [B, 1, S, S]
    %m = %a & %a.transpose(2, 3)             with %keys bool [B, 1, 1, S]

Rows of padded queries have no key at all; their output is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import shape_hint
from ..operators.names import op_name, operand, tensor_value
from ..operators.rules import masks
from ..operators.table import operator_of, permutation
from .writes import is_rewritten


def row_mask(mask: Any) -> fx.Node | None:
    """The bool [B, 1, 1, S] of which a mask is the product with its own transpose; None if it is no such mask."""
    mask = _below(mask)
    if mask is None or op_name(mask) != "logical_and" or len(mask.args) != 2:
        return None
    for one, other in (mask.args, reversed(mask.args)):
        keys, turned = _keys(one), _below(other)
        if keys is None or turned is None or permutation(turned, 4) != [0, 1, 3, 2] or is_rewritten(turned):
            continue
        if _keys(operand(turned)) is keys:
            return keys
    return None


def _keys(node: Any) -> fx.Node | None:
    """The [B, 1, 1, S] that a tensor repeats along its third dimension; None if it does not."""
    base = _below(node, repeated=True)
    shape, below = shape_hint(node) if base is not None else None, shape_hint(base) if base is not None else None
    if shape is None or below is None or len(shape) != 4 or len(below) != 4:
        return None
    return base if below[1:3] == (1, 1) and shape[3] == below[3] and shape[0] == below[0] else None


def _below(node: Any, repeated: bool = False) -> fx.Node | None:
    """The bool tensor below operations that leave a mask as it is, or also below those that repeat it."""
    value = tensor_value(node)
    while value is not None and value.dtype == torch.bool and value.dim() == 4 and not is_rewritten(node):
        base, below = operand(node), tensor_value(operand(node))
        same_keys = below is not None and below.dim() == 4 and below.dtype == torch.bool
        if not same_keys or not (_is_same(node) or (repeated and operator_of(node).mask is masks.repeat)):
            return node
        node, value = base, below
    return None


def _is_same(node: fx.Node) -> bool:
    """Whether an operation leaves a mask as it is, in all its dimensions."""
    entry = operator_of(node)
    kept = entry.mask is masks.regroup and shape_hint(node) == shape_hint(operand(node))
    return kept or (entry.mask is masks.same and not entry.negates)
