"""How axes move where a dimension is cut into pieces, or made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...axes.alignment import unify
from ...axes.concatenation import concat, glue, same, slice_label
from ...axes.labels import Label, Part, Row, Within, are_mirrored, fresh, resolve
from ...axes.streams import all_one, get_stream
from ...axes.tensor_labels import Labels, get_labels
from ..calls import AxisTrace


def slice_(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Rows of one dimension; of a step other than 1 nothing is known."""
    tensor = args[0]
    dim = (args[1] if len(args) > 1 else 0) % tensor.dim()
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    step = args[4] if len(args) > 4 else 1
    size = tensor.shape[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    labels = list(get_labels(tensor))
    n = out.shape[dim]
    if step == 1:
        labels[dim] = _rows(trace, labels, dim, start, start + n)
    else:
        labels[dim] = fresh(n, trace.source(dim))
    return labels


def select(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """One dimension is dropped."""
    dim, labels = args[1] % args[0].dim(), list(get_labels(args[0]))
    size = args[0].shape[dim]
    if len(args) > 2 and dim + 1 < len(labels):
        row = args[2] % size
        labels[dim + 1] = Within.of(Part(labels[dim], row, row + 1), labels[dim + 1])
    del labels[dim]
    return labels


def unbind(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Labels]:
    """One dimension is dropped, in each output."""
    dim = args[1] if len(args) > 1 else 0
    return [select(trace, piece, (args[0], dim, i), {}) for i, piece in enumerate(out)]


def split(trace: AxisTrace, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Labels]:
    """Rows of one dimension, one piece after the other."""
    tensor = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % tensor.dim()
    result, start = [], 0
    for piece in out:
        result.append(_of_peer(trace, tensor, dim, start, piece.shape[dim]))
        start += piece.shape[dim]
    return result


def _of_peer(trace: AxisTrace, tensor: torch.Tensor, dim: int, start: int, n: int) -> Labels:
    """Labels of `n` rows of a dimension; what one process has sent is labelled as that process has it."""
    labels = list(get_labels(tensor))
    leaves = resolve(labels[dim])
    peers = leaves[0].peers if leaves else None
    if peers is None or n * peers.size != tensor.shape[dim]:
        labels[dim] = _rows(trace, labels, dim, start, start + n)
        return labels
    labels[dim] = leaves[1:]
    return [trace.shards.of_peer(label, start // n, peers, trace.source(d)) for d, label in enumerate(labels)]


def _rows(trace: AxisTrace, labels: Labels, dim: int, start: int, stop: int) -> Label:
    """Label of some rows of a dimension, which may be those of this process."""
    rows = slice_label(labels[dim], start, stop, trace.source(dim))
    return trace.shards.noted(trace.shards.mark(rows, labels[dim], start, stop))


def cat(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Pieces of one dimension; rows of an axis, all and in order, are that axis again."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    tensors = [x for x in args[0] if x.dim() == out.dim()]
    labels = _aligned(trace, tensors, skip=dim)
    frames = _frames(trace, tensors)
    if frames and all(same(get_labels(x)[dim], labels[dim]) for x in tensors):
        labels[dim] = (*frames, *labels[dim])
        return labels
    rows = glue([label.part for x in tensors if isinstance(label := get_labels(x)[dim], Within)])
    if len(rows) == 1 and rows[0].size == out.shape[dim]:
        labels[dim] = concat(rows, trace.source(dim))
        return labels
    pieces = [Part(get_labels(x)[dim], 0, x.shape[dim]) for x in tensors]
    labels[dim] = trace.shards.noted(concat([p for piece in pieces for p in _flat(piece)], trace.source(dim)))
    return labels


def stack(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """A new dimension; rows of an axis, all and in order, are that axis again."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels = _aligned(trace, args[0])
    kind = "feature" if all_one(args[0]) else "op"
    labels.insert(dim, _frames(trace, args[0]) or fresh(out.shape[dim], trace.source(dim, kind)))
    return labels


def pad(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Rows of nothing before and behind."""
    tensor, amounts = args[0], args[1]
    labels = list(get_labels(tensor))
    for k in range(len(amounts) // 2):
        d = tensor.dim() - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        if min(before, after) < 0:
            labels[d] = fresh(out.shape[d], trace.source(d))
        elif before or after:
            pieces = [
                Part(fresh(before, trace.source(d)), 0, before),
                *_flat(Part(labels[d], 0, tensor.shape[d])),
                Part(fresh(after, trace.source(d)), 0, after),
            ]
            labels[d] = concat(pieces, trace.source(d))
    return labels


def _aligned(trace: AxisTrace, tensors: Sequence[torch.Tensor], skip: int | None = None) -> Labels:
    """Labels of tensors that are put side by side, dimension `skip` apart. Rows in two directions are no axis."""
    labels = list(get_labels(tensors[0]))
    for d in range(len(labels)):
        others = [get_labels(x)[d] for x in tensors[1:]]
        if d == skip:
            continue
        if any(are_mirrored(labels[d], other) for other in others):
            labels[d] = fresh(tensors[0].shape[d], trace.source(d))
            for axis in labels[d]:
                axis.reversed = True
            continue
        for other in others:
            labels[d] = unify(labels[d], other, trace.node)
    return labels


def _frames(trace: AxisTrace, tensors: Sequence[torch.Tensor]) -> Label:
    """The axis of which tensors were made row by row, each from one row and in order; () if they were not."""
    if len(tensors) < 2:
        return ()
    return trace.streams.rows_one_by_one([None if (s := get_stream(x)) is None else s.term for x in tensors])


def _flat(piece: Part) -> Sequence[Part]:
    if isinstance(piece.label, Row):
        return (piece.label.part,)
    leaves = resolve(piece.label)
    return leaves[0].parts if len(leaves) == 1 and leaves[0].parts else (piece,)
