"""How axes move through elementwise operations, views, slices and concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .labels import (
    Label,
    Part,
    Row,
    are_mirrored,
    concat,
    fresh,
    label_size,
    mirrored,
    resolve,
    same,
    slice_label,
    unify,
)
from .reshape import reshape
from .streams import all_one, get_stream
from .tensor_labels import Labels, get_labels

Mode = Any  # _axis_rules.AxisMode


def pointwise(mode: Mode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels | None:
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
            labels[offset + d] = unify(current, label, mode.node) if current else label
    return [
        label if label_size(label) == n else fresh(n, mode.source(d))
        for d, (label, n) in enumerate(zip(labels, out.shape, strict=True))
    ]


def like_first(mode: Mode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Output (or the first of several outputs) has the dimensions of the first argument."""
    labels = list(get_labels(args[0]))
    return [labels] if isinstance(out, (tuple, list)) else labels


def keep_sizes(mode: Mode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Leading dimensions of equal size keep their axis (normalisation, packing of complex numbers)."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    labels = get_labels(args[0])
    kept = [
        labels[d] if d < len(labels) and args[0].shape[d] == n else fresh(n, mode.source(d))
        for d, n in enumerate(first.shape)
    ]
    return [kept] if isinstance(out, (tuple, list)) else kept


def view(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Row-major regrouping."""
    return reshape(get_labels(args[0]), list(out.shape), mode.source())


def view_dtype(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """`view` has two meanings: another shape or another dtype."""
    if isinstance(args[1], torch.dtype):
        return keep_sizes(mode, out, args, kwargs)
    return view(mode, out, args, kwargs)


def permute(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = get_labels(args[0])
    return [labels[d] for d in args[1]]


def transpose(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = list(get_labels(args[0]))
    if labels:
        labels[args[1]], labels[args[2]] = labels[args[2]], labels[args[1]]
    return labels


def t(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return list(reversed(get_labels(args[0])))


def unsqueeze(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = list(get_labels(args[0]))
    labels.insert(args[1] % out.dim(), ())
    return labels


def squeeze(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    tensor, rest = args[0], args[1:]
    dims = range(tensor.dim()) if not rest else [rest[0]] if isinstance(rest[0], int) else rest[0]
    gone = {d % max(tensor.dim(), 1) for d in dims if tensor.dim() and tensor.shape[d] == 1}
    return [label for d, label in enumerate(get_labels(tensor)) if d not in gone]


def expand(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    tensor = args[0]
    labels, offset = get_labels(tensor), out.dim() - tensor.dim()
    return [
        labels[d - offset] if d >= offset and tensor.shape[d - offset] == n else fresh(n, mode.source(d))
        for d, n in enumerate(out.shape)
    ]


def repeat(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Each dimension is (copies x old)."""
    tensor = args[0]
    labels, offset = get_labels(tensor), out.dim() - tensor.dim()
    result: Labels = []
    for d, n in enumerate(out.shape):
        old = labels[d - offset] if d >= offset else ()
        copies = n // max(label_size(old), 1)
        result.append((*fresh(copies, mode.source(d)), *old))
    return result


def slice_(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    tensor = args[0]
    dim = (args[1] if len(args) > 1 else 0) % tensor.dim()
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    step = args[4] if len(args) > 4 else 1
    size = tensor.shape[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    labels = list(get_labels(tensor))
    n = out.shape[dim]
    if step == 1:
        labels[dim] = slice_label(labels[dim], start, start + n, mode.source(dim))
    else:
        labels[dim] = fresh(n, mode.source(dim))
    return labels


def select(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = list(get_labels(args[0]))
    del labels[args[1] % args[0].dim()]
    return labels


def unbind(mode: Mode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Labels]:
    dim = args[1] if len(args) > 1 else 0
    return [select(mode, piece, (args[0], dim), {}) for piece in out]


def split_(mode: Mode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Labels]:
    tensor = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % tensor.dim()
    result, start = [], 0
    for piece in out:
        labels = list(get_labels(tensor))
        labels[dim] = slice_label(labels[dim], start, start + piece.shape[dim], mode.source(dim))
        result.append(labels)
        start += piece.shape[dim]
    return result


def cat(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    tensors = [x for x in args[0] if x.dim() == out.dim()]
    labels = _aligned(mode, tensors, skip=dim)
    frames = _frames(mode, tensors)
    if frames and all(same(get_labels(x)[dim], labels[dim]) for x in tensors):
        labels[dim] = (*frames, *labels[dim])
        return labels
    pieces = [Part(get_labels(x)[dim], 0, x.shape[dim]) for x in tensors]
    labels[dim] = concat([p for piece in pieces for p in _flat(piece)], mode.source(dim))
    return labels


def _aligned(mode: Mode, tensors: Sequence[torch.Tensor], skip: int | None = None) -> Labels:
    """Labels of tensors that are put side by side, dimension `skip` apart. Rows in two directions are no axis."""
    labels = list(get_labels(tensors[0]))
    for d in range(len(labels)):
        others = [get_labels(x)[d] for x in tensors[1:]]
        if d == skip:
            continue
        if any(are_mirrored(labels[d], other) for other in others):
            labels[d] = fresh(tensors[0].shape[d], mode.source(d))
            for axis in labels[d]:
                axis.reversed = True
            continue
        for other in others:
            labels[d] = unify(labels[d], other, mode.node)
    return labels


def _frames(mode: Mode, tensors: Sequence[torch.Tensor]) -> Label:
    """The axis of which tensors were made row by row, each from one row and in order; () if they were not."""
    if len(tensors) < 2:
        return ()
    return mode.streams.rows_one_by_one([None if (s := get_stream(x)) is None else s.term for x in tensors])


def flip(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    dims = {d % max(out.dim(), 1) for d in args[1]}
    return [mirrored(label, mode.source(d)) if d in dims else label for d, label in enumerate(get_labels(args[0]))]


def _flat(piece: Part) -> Sequence[Part]:
    if isinstance(piece.label, Row):
        return (piece.label.part,)
    leaves = resolve(piece.label)
    return leaves[0].parts if len(leaves) == 1 and leaves[0].parts else (piece,)


def stack(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels = _aligned(mode, args[0])
    kind = "feature" if all_one(args[0]) else "op"
    labels.insert(dim, _frames(mode, args[0]) or fresh(out.shape[dim], mode.source(dim, kind)))
    return labels


def pad(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    tensor, amounts = args[0], args[1]
    labels = list(get_labels(tensor))
    for k in range(len(amounts) // 2):
        d = tensor.dim() - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        if min(before, after) < 0:
            labels[d] = fresh(out.shape[d], mode.source(d))
        elif before or after:
            pieces = [
                Part(fresh(before, mode.source(d)), 0, before),
                *_flat(Part(labels[d], 0, tensor.shape[d])),
                Part(fresh(after, mode.source(d)), 0, after),
            ]
            labels[d] = concat(pieces, mode.source(d))
    return labels
