"""How axes move where a tensor is regrouped, transposed, repeated or mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...axes.labels import Label, Row, Within, fresh, label_size, mirrored
from ...axes.reshape import reshape
from ...axes.tensor_labels import Labels, get_labels
from ..calls import AxisTrace
from .pointwise import keep_sizes


def view(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Row-major regrouping."""
    labels, shape = get_labels(args[0]), list(args[0].shape)
    for d, label in enumerate(labels):
        if isinstance(label, Row) and [*shape[:d], *shape[d + 1 :]] == list(out.shape):
            return _dropped(labels, {d})
    source, sizes = trace.source(), list(out.shape)
    return [
        trace.shards.rejoined(label, source)
        for label in reshape(trace.shards.parted(labels, sizes, source), sizes, source)
    ]


def view_dtype(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """`view` has two meanings: another shape or another dtype."""
    if isinstance(args[1], torch.dtype):
        return keep_sizes(trace, out, args, kwargs)
    return view(trace, out, args, kwargs)


def permute(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Dimensions in the order given."""
    labels = get_labels(args[0])
    return [labels[d] for d in args[1]]


def transpose(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Two dimensions exchanged."""
    labels = list(get_labels(args[0]))
    if labels:
        labels[args[1]], labels[args[2]] = labels[args[2]], labels[args[1]]
    return labels


def t(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Both dimensions of a matrix exchanged."""
    return list(reversed(get_labels(args[0])))


def unsqueeze(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """A dimension of size 1 more."""
    labels = list(get_labels(args[0]))
    labels.insert(args[1] % out.dim(), ())
    return labels


def squeeze(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Dimensions of size 1, all or some, are dropped."""
    tensor, rest = args[0], args[1:]
    dims = range(tensor.dim()) if not rest else [rest[0]] if isinstance(rest[0], int) else rest[0]
    gone = {d % max(tensor.dim(), 1) for d in dims if tensor.dim() and tensor.shape[d] == 1}
    return _dropped(get_labels(tensor), gone)


def _dropped(labels: Sequence[Label], gone: set[int]) -> Labels:
    """Labels without some of size 1; the one behind a single row remembers of which it is."""
    kept = list(labels)
    for d in gone:
        row = kept[d]
        if isinstance(row, Row) and d + 1 < len(kept):
            kept[d + 1] = Within.of(row.part, kept[d + 1])
    return [label for d, label in enumerate(kept) if d not in gone]


def expand(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Dimensions of size 1 are repeated: they have axes of their own."""
    tensor = args[0]
    labels, offset = get_labels(tensor), out.dim() - tensor.dim()
    return [
        labels[d - offset] if d >= offset and tensor.shape[d - offset] == n else fresh(n, trace.source(d))
        for d, n in enumerate(out.shape)
    ]


def repeat(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Each dimension is (copies x old)."""
    tensor = args[0]
    labels, offset = get_labels(tensor), out.dim() - tensor.dim()
    result: Labels = []
    for d, n in enumerate(out.shape):
        old = labels[d - offset] if d >= offset else ()
        copies = n // max(label_size(old), 1)
        result.append((*fresh(copies, trace.source(d)), *old))
    return result


def flip(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Some dimensions in reverse order."""
    dims = {d % max(out.dim(), 1) for d in args[1]}
    return [mirrored(label, trace.source(d)) if d in dims else label for d, label in enumerate(get_labels(args[0]))]
