"""How axes move through elementwise operations, views, slices and concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ._axes import Part, concat, fresh, label_size, reshape, resolve, slice_label, unify
from ._tensor_labels import Labels, get_labels

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
            if tensor.shape[d] == 1 or tensor.shape[d] != out.shape[offset + d]:
                continue
            current = labels[offset + d]
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
    labels = list(get_labels(tensors[0]))
    for tensor in tensors[1:]:
        for d, label in enumerate(get_labels(tensor)):
            if d != dim:
                labels[d] = unify(labels[d], label, mode.node)
    pieces = [Part(get_labels(x)[dim], 0, x.shape[dim]) for x in tensors]
    labels[dim] = concat([p for piece in pieces for p in _flat(piece)], mode.source(dim))
    return labels


def _flat(piece: Part) -> Sequence[Part]:
    leaves = resolve(piece.label)
    return leaves[0].parts if len(leaves) == 1 and leaves[0].parts else (piece,)


def stack(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels = list(get_labels(args[0][0]))
    for tensor in args[0][1:]:
        for d, label in enumerate(get_labels(tensor)):
            labels[d] = unify(labels[d], label, mode.node)
    labels.insert(dim, fresh(out.shape[dim], mode.source(dim)))
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
