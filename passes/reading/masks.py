"""Masks: whether one only hides keys, the same for every query, and the bool [B or 1, S] that says which it keeps.

bool [B, 1, 1, S]                                         its values are read when the graph runs
the same expanded or repeated over heads or queries       followed back through the reshapes
the same for keys and queries                             see _row_masks
float, 0 or very negative, added to the scores            only where the graph shows that it is nothing else

A query that is left without any key gets 0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dynamicrad_compile.reporting.reason import PROMPT_MASK, Reason

from ..axes.labels import Label, Source, fresh, label_size, resolve
from ..axes.reshape import reshape
from ..graph import hint, shape_hint
from ..site import AttentionCall
from .row_masks import row_mask
from .spelling import argument, is_rewritten, number, op_name, permutation, tensor_value

HIDDEN = -1e4
"""A score lowered by this much or more has weight 0 in every dtype (exp(-104) is 0 in float32)."""

_COPY = "copy"  # kind of an axis along which a mask repeats itself
_SAME_SHAPE = {"cast", "same", "logical_not"}


def not_key_padding(call: AttentionCall, tokens: int) -> Reason | None:
    """Why the mask of a call does more than hide keys; None if it does not."""
    assert call.mask is not None
    value, shape = tensor_value(call.mask), shape_hint(call.mask)
    if value is None or shape is None:
        return Reason("mask_shape_unknown", "a mask whose shape is unknown", PROMPT_MASK)
    if masks_rows(call):
        return None
    is_bool = value.dtype == torch.bool
    if call.mask_is == "bias" and not is_bool and not shows_hiding(call.mask):
        text = f"additive mask {_name(value)} {list(shape)}: nothing in the graph shows that it is 0 or -inf"
        return Reason("additive_mask", text, PROMPT_MASK)
    if call.mask_is != "bias" and not is_bool:
        return Reason("mask_not_bool", f"mask {_name(value)} {list(shape)} is not bool", PROMPT_MASK)
    letters = call.mask_layout[-len(shape) :]
    if len(shape) > len(call.mask_layout) or letters[-1:] != "k" or shape[-1] != tokens:
        text = f"mask {list(shape)} is not a key padding mask over {tokens} keys"
        return Reason("mask_not_over_keys", text, PROMPT_MASK)
    labels = mask_labels(call.mask)
    for letter, label in zip(letters, labels, strict=True):
        if letter in "hq" and not repeats(label):
            which = {"h": "head", "q": "query"}[letter]
            text = f"mask {_name(value)} {list(shape)} is not a key padding mask [B, 1, 1, S]: it differs by {which}"
            return Reason("mask_differs", text, PROMPT_MASK)
    return None


def masks_rows(call: AttentionCall) -> fx.Node | None:
    """The bool [B, 1, 1, S] of a mask that hides tokens as keys and as queries; None for any other mask."""
    return row_mask(call.mask) if call.mask_is == "keep" and call.mask_layout == "bhqk" else None


def without_hidden_rows(graph: fx.Graph, call: AttentionCall, out: fx.Node, keys: fx.Node) -> fx.Node:
    """Node of the op's output with 0 for queries that the mask hides; `keys` is the bool [B or 1, S] of the mask."""
    if masks_rows(call) is None:
        return out
    hidden = graph.call_function(torch.logical_not, (keys,))
    rows = graph.call_function(operator.getitem, (hidden, (slice(None), None, slice(None), None)))
    return graph.call_method("masked_fill", (out, rows, 0))


def keys_node(graph: fx.Graph, call: AttentionCall) -> fx.Node:
    """Nodes of the bool [B or 1, S] that is True for keys to attend."""
    assert call.mask is not None
    value = tensor_value(call.mask)
    assert value is not None
    letters = call.mask_layout[-value.dim() :]
    known = masks_rows(call)
    keys = call.mask if known is None else known
    if any(letter in "hq" for letter in letters):
        index = tuple(slice(None) if letter in "bk" else 0 for letter in letters)
        keys = graph.call_function(operator.getitem, (keys, index))
    if "b" not in letters:
        keys = graph.call_method("unsqueeze", (keys, 0))
    if call.mask_is == "drop":
        return graph.call_function(torch.logical_not, (keys,))
    if call.mask_is == "bias" and value.dtype != torch.bool:
        return graph.call_function(torch.gt, (keys, HIDDEN / 2))
    return keys


def repeats(label: Label) -> bool:
    """Whether a mask is the same all along a dimension with this label."""
    return all(axis.source.kind == _COPY for axis in resolve(label))


def mask_labels(node: fx.Node) -> list[Label]:
    """Labels of a mask's dimensions, followed back through the operations that shaped it."""
    shape = shape_hint(node)
    assert shape is not None
    base = node.args[0] if node.args else None
    name = op_name(node)
    inner = shape_hint(base) if isinstance(base, fx.Node) and name in _MOVES else None
    if isinstance(base, fx.Node) and inner is not None and not is_rewritten(node):
        labels = _MOVES[name](node, mask_labels(base), inner, shape)
        if labels is not None and [label_size(label) for label in labels] == list(shape):
            return labels
    value = tensor_value(node)
    strides = [hint(s) for s in value.stride()] if value is not None else []
    kinds = [_COPY if stride == 0 else "op" for stride in strides]
    return [fresh(n, Source(node.name, d, kinds[d], len(shape))) for d, n in enumerate(shape)]


Shape = tuple[int, ...]


def _same(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    return labels


def _view(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """`view`, `reshape` and `expand`: the same elements regrouped, or dimensions of size 1 repeated."""
    sizes = 1
    for n in inner:
        sizes *= n
    total = 1
    for n in shape:
        total *= n
    if sizes == total:
        return reshape(labels, list(shape), Source(node.name, 0, "op", len(shape)))
    return _expand(node, labels, inner, shape)


def _expand(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """Sizes of 1 grow by repetition, as in `expand`; `repeat` of a larger size puts copies in front."""
    offset = len(shape) - len(inner)
    out: list[Label] = []
    for d, n in enumerate(shape):
        old = labels[d - offset] if d >= offset else ()
        copies, rest = divmod(n, label_size(old))
        if rest:
            return None
        out.append((*fresh(copies, Source(node.name, d, _COPY, len(shape))), *old))
    return out


def _repeat_interleave(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    dim, times = argument(node, 2, "dim"), argument(node, 1, "repeats")
    if not isinstance(dim, int) or not isinstance(times, int):
        return None
    out = list(labels)
    out[dim] = (*out[dim], *fresh(times, Source(node.name, dim, _COPY, len(shape))))
    return out


def _permute(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    order = permutation(node, len(inner))
    return None if order is None else [labels[d] for d in order]


def _getitem(node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
    """Whole dimensions, new ones and single positions; anything else is not followed."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        missing = len(inner) - sum(i is not None for i in index) + 1
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    out: list[Label] = []
    left = list(labels)
    for i in index:
        if i is None:
            out.append(())
        elif i == slice(None) and left:
            out.append(left.pop(0))
        elif isinstance(i, int) and left:
            left.pop(0)
        else:
            return None
    return [*out, *left]


_MOVES: dict[str, Callable[[fx.Node, list[Label], Shape, Shape], list[Label] | None]] = {
    **dict.fromkeys(_SAME_SHAPE, _same),
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze"), _view),
    **dict.fromkeys(("expand", "repeat"), _expand),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("permute", "transpose", "mT"), _permute),
    "getitem": _getitem,
    "slice": lambda node, labels, inner, shape: labels if inner == shape else None,
}


def shows_hiding(node: Any, depth: int = 16, by: fx.Node | None = None) -> bool:
    """Whether the graph shows that a float mask is 0 where a key is attended and HIDDEN or less elsewhere.

    `by` is the node that uses it, and may write over it.
    """
    if not isinstance(node, fx.Node) or depth == 0 or is_rewritten(node, but_by=by):
        return False

    def inner(x: Any) -> bool:
        return _is_level(x, node) or shows_hiding(x, depth - 1, by=node)

    name = op_name(node)
    if name in _MOVES and name != "logical_not":
        return shows_hiding(node.args[0], depth - 1, by=node)
    if name == "masked_fill":
        return inner(node.args[0]) and _is_level(argument(node, 2, "value"), node)
    if name == "where" and len(node.args) == 3:
        return inner(node.args[1]) and inner(node.args[2])
    if name in ("add", "minimum"):
        return inner(node.args[0]) and inner(node.args[1]) and not node.kwargs
    if name == "mul":
        for flag, factor in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            low = number(factor)
            if low is not None and low <= HIDDEN and _is_flag(flag):
                return True
    return False


def _is_level(value: Any, by: fx.Node) -> bool:
    """0, or low enough to hide a key."""
    constant = number(value, by)
    return constant is not None and (constant == 0 or constant <= HIDDEN)


def _is_flag(node: Any, depth: int = 8) -> bool:
    """Whether a float is 0 or 1: a bool that was cast, or 1 minus one."""
    if not isinstance(node, fx.Node) or depth == 0 or is_rewritten(node):
        return False
    value, name = tensor_value(node), op_name(node)
    if value is not None and value.dtype == torch.bool:
        return True
    if name == "rsub" or (name == "sub" and number(node.args[0]) == 1):
        return number(node.args[0 if name == "sub" else 1]) == 1 and _is_flag(node.args[1 if name == "sub" else 0])
    return name in _MOVES and name != "logical_not" and _is_flag(node.args[0], depth - 1)


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
