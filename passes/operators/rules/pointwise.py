"""How axes move where every element stays in its place, or whole dimensions are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...axes.alignment import unify
from ...axes.labels import Row, fresh, label_size
from ...axes.tensor_labels import Labels, get_labels
from ..calls import AxisTrace


def broadcast(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels | None:
    """Broadcasting: aligned dimensions are the same axis."""
    if not isinstance(out, torch.Tensor):
        return None
    labels: Labels = [()] * out.dim()
    for tensor in tree_leaves((args, kwargs)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() > out.dim():
            continue
        offset = out.dim() - tensor.dim()
        for d, label in enumerate(get_labels(tensor)):
            if tensor.shape[d] != out.shape[offset + d]:
                continue
            current = labels[offset + d]
            if tensor.shape[d] == 1:
                labels[offset + d] = current if isinstance(current, Row) else label
                continue
            labels[offset + d] = unify(current, label, trace.node) if current else label
    return [
        label if label_size(label) == n else fresh(n, trace.source(d))
        for d, (label, n) in enumerate(zip(labels, out.shape, strict=True))
    ]


def like_first(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Output (or the first of several outputs) has the dimensions of the first argument."""
    if not isinstance(args[0], torch.Tensor):
        return None
    labels = list(get_labels(args[0]))
    return [labels] if isinstance(out, (tuple, list)) else labels


def like_each(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Each of several outputs has the dimensions of the argument in its place, a single one those of the first."""
    if not isinstance(out, (tuple, list)):
        return like_first(trace, out, args, kwargs)
    return [list(get_labels(x)) for x in args[: len(out)]]


def keep_sizes(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Leading dimensions of equal size keep their axis (normalisation, packing of complex numbers)."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    labels = get_labels(args[0])
    kept = [
        labels[d] if d < len(labels) and args[0].shape[d] == n else fresh(n, trace.source(d))
        for d, n in enumerate(first.shape)
    ]
    return [kept] if isinstance(out, (tuple, list)) else kept


def reduce(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Reductions drop or flatten dimensions to 1."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    tensor = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(dims, torch.Tensor):  # max and min of two tensors
        return broadcast(trace, out, args, kwargs)
    dims = None if isinstance(dims, bool) else dims
    return _reduced(first, tensor, dims, isinstance(out, (tuple, list)))


def norm(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Norms have their order before the dimensions."""
    return _reduced(out, args[0], args[2] if len(args) > 2 else kwargs.get("dim"), False)


def _reduced(first: torch.Tensor, tensor: torch.Tensor, dims: Any, several: bool) -> Any:
    dims = range(tensor.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % max(tensor.dim(), 1) for d in dims}
    labels = get_labels(tensor)
    kept = [() if d in gone else label for d, label in enumerate(labels)]
    if first.dim() != tensor.dim():
        kept = [label for d, label in enumerate(labels) if d not in gone]
    return [kept, kept] if several else kept
