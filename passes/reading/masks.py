"""Masks: whether one only hides keys, the same for every query, and the bool [B or 1, S] that says which it keeps.

bool [B, 1, 1, S]                                         its values are read when the graph runs
the same expanded or repeated over heads or queries       followed back through the reshapes
the same for keys and queries                             see row_masks
float, 0 or very negative, added to the scores            only where the graph shows that it is nothing else

A query that is left without any key gets 0.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dynamicrad_compile.reporting.reason import PROMPT_MASK, QUERY_MASK, Reason

from ..axes.labels import Label, Source, fresh, label_size, resolve
from ..graph import hint, shape_hint
from ..operators.names import tensor_value
from ..operators.rules.masks import COPY
from ..operators.table import operator_of
from ..site import AttentionCall
from .hiding import HIDDEN, shows_hiding
from .row_masks import row_mask
from .writes import is_rewritten


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
            return Reason("mask_differs", text, QUERY_MASK)
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
    return graph.call_function(torch.masked_fill, (out, rows, 0))


def keys_before(keys: torch.Tensor, dim: int, starts: torch.Tensor) -> torch.Tensor:
    """bool [1, S] of keys with their tokens along `dim`: those in front of the second of two starts."""
    return (torch.arange(keys.shape[dim], device=keys.device) < starts[1:])[None]


def keys_node(graph: fx.Graph, call: AttentionCall) -> fx.Node | None:
    """Nodes of the bool [B or 1, S] that is True for keys to attend; None where all are."""
    if call.key_end is not None:
        return graph.call_function(keys_before, (call.key, call.layouts[1].index("t"), call.key_end))
    if call.mask is None:
        return None
    value = tensor_value(call.mask)
    assert value is not None
    letters = call.mask_layout[-value.dim() :]
    known = masks_rows(call)
    keys = call.mask if known is None else known
    if any(letter in "hq" for letter in letters):
        index = tuple(slice(None) if letter in "bk" else 0 for letter in letters)
        keys = graph.call_function(operator.getitem, (keys, index))
    if "b" not in letters:
        keys = graph.call_function(torch.unsqueeze, (keys, 0))
    if call.mask_is == "drop":
        return graph.call_function(torch.logical_not, (keys,))
    if call.mask_is == "bias" and value.dtype != torch.bool:
        return graph.call_function(torch.gt, (keys, HIDDEN / 2))
    return keys


def repeats(label: Label) -> bool:
    """Whether a mask is the same all along a dimension with this label."""
    return all(axis.source.kind == COPY for axis in resolve(label))


def mask_labels(node: fx.Node) -> list[Label]:
    """Labels of a mask's dimensions, followed back through the operations that shaped it."""
    shape = shape_hint(node)
    assert shape is not None
    base = node.args[0] if node.args else None
    inner = shape_hint(base) if isinstance(base, fx.Node) and operator_of(node).carries_mask else None
    if isinstance(base, fx.Node) and inner is not None and not is_rewritten(node):
        labels = operator_of(node).mask_labels(node, mask_labels(base), inner, shape)
        if labels is not None and [label_size(label) for label in labels] == list(shape):
            return labels
    value = tensor_value(node)
    strides = [hint(s) for s in value.stride()] if value is not None else []
    kinds = [COPY if stride == 0 else "op" for stride in strides]
    return [fresh(n, Source(node.name, d, kinds[d], len(shape))) for d, n in enumerate(shape)]


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
