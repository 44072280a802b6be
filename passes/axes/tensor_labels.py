"""What is known of a fake tensor on its way through the trace, kept on the tensor itself.

labels   one for each dimension
base     the tensor of which it is a view
range    for an integer index with consecutive values: the dimension along which they grow, and the first of them
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .labels import Label, Source, fresh

Labels = list[Label]


class Rows(NamedTuple):
    """Rows `start..stop` of the `size` rows along a dimension."""

    dim: int
    start: int
    stop: int
    size: int


MAX_INDEX = 1 << 20  # longer constants are not looked at


class Range(NamedTuple):
    """Consecutive integers: `start`, `start + 1`, ... along `dim`, the same in all other dimensions."""

    dim: int
    start: int


def get_labels(tensor: torch.Tensor, source: Source | None = None) -> Labels:
    """Labels of a tensor's dimensions; fresh ones at first sight."""
    labels = getattr(tensor, "_drad_labels", None)
    if labels is None or len(labels) != tensor.dim():
        node = source or Source("constant", 0, "op")
        labels = [fresh(n, Source(node.node, d, node.kind, tensor.dim())) for d, n in enumerate(tensor.shape)]
        set_labels(tensor, labels)
    return labels


def set_labels(tensor: torch.Tensor, labels: Labels) -> None:
    """Attach labels, one per dimension."""
    tensor._drad_labels = labels


def get_base(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor whose memory a view shows."""
    return getattr(tensor, "_drad_base", tensor)


def set_base(view: torch.Tensor, of: torch.Tensor) -> None:
    """Note that a tensor shows the memory of another."""
    if view is not of:
        view._drad_base = get_base(of)


def rows_shown(view: torch.Tensor) -> Rows | None:
    """Which rows of its base a view shows, where these are all that it lacks of it; None where that is not so."""
    base = get_base(view)
    if base is view or view.dim() != base.dim() or view.stride() != base.stride():
        return None
    differing = [d for d in range(view.dim()) if view.shape[d] != base.shape[d]]
    if len(differing) != 1:
        return None
    (d,), offset = differing, view.storage_offset() - base.storage_offset()
    step = base.stride(d)
    start = offset // step if step else 0
    fits = offset == start * step and start + view.shape[d] <= base.shape[d]
    return Rows(d, int(start), int(start + view.shape[d]), base.shape[d]) if fits else None


def get_range(tensor: object) -> Range | None:
    """The consecutive integers in an index; None if it holds others, or values that are not known."""
    return getattr(tensor, "_drad_range", None)


def set_range(tensor: torch.Tensor, found: Range | None) -> None:
    """Attach the consecutive integers that an index holds."""
    tensor._drad_range = found


def range_of_values(tensor: torch.Tensor) -> Range | None:
    """The range that a real one-dimensional tensor of integers holds."""
    if tensor.dim() != 1 or not 0 < tensor.numel() <= MAX_INDEX or tensor.dtype not in (torch.int64, torch.int32):
        return None
    with _disable_current_modes():
        values = tensor.tolist()
    return Range(0, values[0]) if values == list(range(values[0], values[0] + len(values))) else None
