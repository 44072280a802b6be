"""How axes move where a tensor is filled piece by piece: new buffers, writes into views, rows written by index.

A new buffer's axes are *blank*. Writing rows 7..247 of a blank axis makes it a concatenation of 7 blank rows, the
written axes, and what is left. Writing over something aligns the two, as an addition would. Rows written in an order
that is not known make an axis of which nothing can be concluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dynamicrad_compile.reporting.reason import SET_GRID, Reason

from ...axes.alignment import unify
from ...axes.concatenation import concat, parts_of, rows_of, slice_label
from ...axes.labels import Axis, Label, Part, Source, fresh, label_size, mixed, resolve, same_axes
from ...axes.streams import get_stream, overwrites
from ...axes.tensor_labels import Labels, Range, Rows, get_base, get_labels, get_range, rows_shown, set_labels
from ..calls import AxisTrace

IF_ALL_VIDEO = (
    "set `grid` if its rows are one video and nothing else, frame by frame and row by row; "
    "of a packed sequence, compile with positions that are an input and have values"
)


def new_buffer(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """empty, zeros, full and the like: axes with nothing in them."""
    labels = [fresh(n, Source(trace.node, d, "op", out.dim())) for d, n in enumerate(out.shape)]
    for label in labels:
        for axis in label:
            axis.blank = True
    return labels


def spoilt(trace: AxisTrace, size: int, dim: int, why: Reason) -> Label:
    """A dimension whose rows are in an unknown order, with the reason."""
    label = fresh(size, trace.source(dim))
    for axis in label:
        axis.why = why
    return label


def write(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Copy into a tensor or a view of one."""
    labels = list(get_labels(args[0]))
    if not isinstance(args[1], torch.Tensor):
        return labels
    rows = rows_shown(out) if overwrites(get_stream(args[0]), get_stream(args[1])) else None
    if rows is not None:
        _overwrite(trace, out, args[1], rows)
        return list(get_labels(args[1])) if args[1].shape == out.shape else labels
    for d, label in _aligned(args[1], out):
        if out is not args[0] or get_base(out) is out:
            labels[d] = label
        else:
            put(labels[d], label, trace.node)
    return labels


def _overwrite(trace: AxisTrace, view: torch.Tensor, source: torch.Tensor, rows: Rows) -> None:
    """Note that rows of what a view is a part of, as a cache of keys, are the tokens of `source` from now on."""
    base = get_base(view)
    labels = list(get_labels(base))
    for d, label in _aligned(source, view):
        if d == rows.dim:
            old = labels[d]
            pieces = [*rows_of(old, 0, rows.start), *parts_of(label), *rows_of(old, rows.stop, rows.size)]
            labels[d] = concat(pieces, trace.source(d))
        else:
            labels[d] = unify(labels[d], label, trace.node)
    set_labels(base, labels)


def put(target: Label, source: Label, node: str) -> None:
    """Note that the rows of `target` now hold those of `source`."""
    leaves = resolve(target)
    parts = leaves[0].parts if len(leaves) == 1 else None
    if len(leaves) == 1 and leaves[0].blank and not parts:
        new = resolve(source)
        leaves[0].blank = False
        if not same_axes(leaves, new):  # x[i] = x[i] + y writes what was read there
            leaves[0].factors = new
        return
    if parts and len(parts) == 1:
        inner = resolve(parts[0].label)
        if len(inner) == 1 and inner[0].blank and not inner[0].parts:
            fill(inner[0], parts[0].start, parts[0].stop, source)
            return
    why = mixed(unify(target, source, node))
    for axis in target:  # other views of the same memory show it, too
        axis.mixed = axis.mixed or why


def fill(blank: Axis, start: int, stop: int, source: Label) -> None:
    """Rows `start..stop` of a blank axis become `source`."""
    blank.parts = tuple(_around(blank, start, stop, source))
    blank.blank = False


def _around(blank: Axis, start: int, stop: int, source: Label) -> list[Part]:
    pieces: list[Part] = []
    for size, label in ((start, None), (stop - start, source), (blank.size - stop, None)):
        if label is None:
            label = fresh(size, blank.source)
            for axis in label:
                axis.blank = True
        if size:
            pieces.append(Part(label, 0, size))
    return pieces


def _aligned(source: torch.Tensor, target: torch.Tensor) -> list[tuple[int, Label]]:
    """(dimension of target, label of source) where broadcasting aligns them."""
    offset = target.dim() - source.dim()
    return [
        (offset + d, label)
        for d, label in enumerate(get_labels(source))
        if offset + d >= 0 and source.shape[d] != 1 and source.shape[d] == target.shape[offset + d]
    ]


def slice_scatter(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """What exported programs have for a write into a slice."""
    tensor, source = args[:2]
    values = dict(zip(("dim", "start", "end", "step"), (0, None, None, 1), strict=True)) | kwargs
    values |= dict(zip(("dim", "start", "end", "step"), args[2:], strict=False))
    dim, step = values["dim"] % out.dim(), values["step"]
    start = values["start"] or 0
    start = min(max(start + out.shape[dim] if start < 0 else start, 0), out.shape[dim])
    found = Range(0, start) if step == 1 else None
    return _write_rows(trace, tensor, dim, found, source, in_place=False, interleaved=step != 1)


def select_scatter(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """One row changes: nothing is learnt, nothing lost."""
    return list(get_labels(args[0]))


def index_copy(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Rows of one dimension, by an index."""
    tensor, dim, index, source = args[:4]
    return _write_rows(trace, tensor, dim % max(out.dim(), 1), get_range(index), source, in_place=out is tensor)


def scatter(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Elements along one dimension, by an index as large as what is written."""
    tensor, dim, index, source = args[:4]
    dim %= max(out.dim(), 1)
    if not isinstance(source, torch.Tensor):
        return list(get_labels(tensor))
    found, others = get_range(index), [d for d in range(out.dim()) if d != dim]
    if found is None or found.dim != dim or any(index.shape[d] != out.shape[d] for d in others):
        found = None
    return _write_rows(trace, tensor, dim, found, source, in_place=out is tensor)


def scatter_add(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Something is added to rows: they stay what they were, unless nothing was there."""
    labels = list(get_labels(args[0]))
    dim = args[1] % max(out.dim(), 1)
    if any(axis.blank for axis in resolve(labels[dim])):
        labels[dim] = spoilt(trace, out.shape[dim], dim, _unknown_order(trace))
    return labels


def index_put(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Rows by indices; of masks and of several dimensions at once the order is not known."""
    tensor, indices, source = args[:3]
    labels = list(get_labels(tensor))
    used = [d for d, i in enumerate(indices) if i is not None]
    if source.numel() == 1 or (len(args) > 3 and args[3]):
        return labels
    if len(used) == 1 and indices[used[0]].dim() == 1 and indices[used[0]].dtype != torch.bool:
        return _write_rows(trace, tensor, used[0], get_range(indices[used[0]]), source, in_place=out is tensor)
    masks = sum(max(i.dim() - 1, 0) for i in indices if i is not None and i.dtype == torch.bool)
    for d in range(used[0], min(used[-1] + 1 + masks, out.dim())):
        labels[d] = spoilt(trace, out.shape[d], d, _unknown_order(trace))
    return labels


def _write_rows(
    trace: AxisTrace, tensor: torch.Tensor, dim: int, rows: Range | None, source: torch.Tensor, *, in_place: bool,
    interleaved: bool = False,
) -> Labels:  # fmt: skip
    """Labels of `tensor` after `source` was written into its rows `rows.start`, ... of dimension `dim`."""
    labels = list(get_labels(tensor))
    offset = tensor.dim() - source.dim()
    for d, label in enumerate(get_labels(source)):
        if 0 <= offset + d != dim and source.shape[d] != 1 and source.shape[d] == tensor.shape[offset + d]:
            if in_place:
                put(labels[offset + d], label, trace.node)
            else:
                labels[offset + d] = unify(labels[offset + d], label, trace.node)
    size, n = tensor.shape[dim], source.shape[dim - offset] if dim >= offset else 1
    old = labels[dim]
    start, stop = (rows.start, rows.start + n) if rows is not None else (0, size)
    empty = any(axis.blank for piece in rows_of(old, start, stop) for axis in resolve(piece.label))
    if (interleaved or n == 1) and not empty:
        return labels
    if rows is None or stop > size:
        labels[dim] = spoilt(trace, size, dim, _unknown_order(trace))
        return labels
    new = get_labels(source)[dim - offset] if dim >= offset else ()
    if (start, stop) == (0, size) and get_base(tensor) is tensor:
        labels[dim] = new
    elif in_place:
        put(slice_label(old, start, stop, trace.source(dim)), new, trace.node)
    elif empty:
        pieces = [*rows_of(old, 0, start), Part(new, 0, label_size(new)), *rows_of(old, stop, size)]
        labels[dim] = concat(pieces, trace.source(dim))
    else:
        why = mixed(unify(slice_label(old, start, stop, trace.source(dim)), new, trace.node))
        labels[dim] = spoilt(trace, size, dim, why) if why else old
    return labels


def _unknown_order(trace: AxisTrace) -> Reason:
    text = f"{trace.node} writes rows by an index whose values are known only when the graph runs"
    return Reason("unknown_rows", text, IF_ALL_VIDEO)


def spoil(trace: AxisTrace, tensor: torch.Tensor, what: str) -> None:
    """Forget the labels of a tensor that an unknown operation changed in place, and of what it is a view of."""
    for one in {id(x): x for x in (tensor, get_base(tensor))}.values():
        text = f"{trace.node} ({what}) changes a tensor in place in a way that is not followed"
        why = Reason("unknown_write", text, SET_GRID)
        set_labels(one, [spoilt(trace, n, d, why) for d, n in enumerate(one.shape)])
