"""How axes move through products, lookups by an index, and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...axes.alignment import unify
from ...axes.concatenation import slice_label
from ...axes.labels import Label, fresh
from ...axes.streams import get_stream
from ...axes.tensor_labels import Labels, get_labels, get_range
from ..calls import AxisTrace


def mm(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[m, k] x [k, n] -> [m, n]."""
    return [get_labels(args[0])[0], _columns(trace, out, args[1])]


def addmm(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[m, k] x [k, n] -> [m, n], with the first operand added."""
    return _added_to(trace, out, args[0], mm(trace, out, args[1:], kwargs))


def bmm(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[B, m, k] x [B, k, n] -> [B, m, n]."""
    a, b = get_labels(args[0]), get_labels(args[1])
    return [unify(a[0], b[0], trace.node), a[1], _columns(trace, out, args[1])]


def baddbmm(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[B, m, k] x [B, k, n] -> [B, m, n], with the first operand added."""
    return _added_to(trace, out, args[0], bmm(trace, out, args[1:], kwargs))


def _added_to(trace: AxisTrace, out: torch.Tensor, first: torch.Tensor, labels: Labels) -> Labels:
    """Labels of a product; in place it has those of the tensor to which it is added as well."""
    if out is not first:
        return labels
    return [unify(old, new, trace.node) for old, new in zip(get_labels(first), labels, strict=True)]


def linear(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[..., k] -> [..., n]."""
    return [*get_labels(args[0])[:-1], fresh(out.shape[-1], trace.source(out.dim() - 1, "feature"))]


def _columns(trace: AxisTrace, out: torch.Tensor, right: torch.Tensor) -> Label:
    """Last dimension of a product: features where the right operand is a weight (nothing that was projected).

    An input with one row is none: the product is of each number with each, as of positions with frequencies.
    """
    stream = get_stream(right)
    if stream is None or not (stream.projected or right.shape[-2] == 1):
        return fresh(out.shape[-1], trace.source(out.dim() - 1, "feature"))
    return get_labels(right)[-1]


def embedding(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[...] of integers -> [..., n]."""
    return [*get_labels(args[1]), fresh(out.shape[-1], trace.source(out.dim() - 1, "feature"))]


def index_select(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Rows of one dimension, by an index."""
    labels = list(get_labels(args[0]))
    dim = args[1] % args[0].dim()
    labels[dim] = _rows(trace, labels[dim], args[0].shape[dim], args[2])[0] if args[2].dim() else ()
    return labels


def index(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels | None:
    """Gather along one dimension by an integer tensor; anything else is not followed."""
    tensor, indices = args[0], args[1]
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) != 1 or indices[used[0]].dtype in (torch.bool, torch.uint8):
        return None
    labels = list(get_labels(tensor))
    labels[used[0] : used[0] + 1] = _rows(trace, labels[used[0]], tensor.shape[used[0]], indices[used[0]])
    return labels


def _rows(trace: AxisTrace, label: Label, size: int, by: torch.Tensor) -> Labels:
    """Rows of a dimension chosen by an index: a slice where its values are consecutive."""
    found = get_range(by)
    if found is not None and by.dim() == 1 and found.start >= 0 and found.start + by.numel() <= size:
        return [slice_label(label, found.start, found.start + by.numel(), trace.source())]
    return get_labels(by)


def attention(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A fused attention kernel: positions of the query, features of the value."""
    query, value = get_labels(args[0]), get_labels(args[2])
    labels = [*query[:-1], value[-1]]
    return [labels] if isinstance(out, (tuple, list)) else labels
