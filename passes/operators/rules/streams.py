"""Which tokens the outputs of an operator are: one rule per family of operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...axes.labels import Label, label_size, resolve
from ...axes.streams import Row, Stream, all_one, get_stream, is_feature, written
from ...axes.tensor_labels import get_labels
from ..calls import StreamCall, StreamRule

Found = list[Stream | None]
MATRIX = 8
"""Rows of the largest square matrix that is taken for a place's, and not for tokens."""


def of_first(call: StreamCall) -> Found:
    """The tokens of the first operand."""
    return [get_stream(call.tensors[0])] * len(call.outs)


def of_each(call: StreamCall) -> Found:
    """Each output the tokens of the operand in its place."""
    return [get_stream(x) for x in call.tensors[: len(call.outs)]]


def of_last(call: StreamCall) -> Found:
    """The tokens of the last operand, as in a lookup by it."""
    return [get_stream(call.tensors[-1])]


def copied(call: StreamCall) -> Found:
    """The tokens that are copied; those of the target where they are none."""
    return [get_stream(call.tensors[-1]) or get_stream(call.tensors[0])]


def elementwise(call: StreamCall) -> Found:
    """The operand that has tokens, a term of all of them if several have."""
    size = call.outs[0].numel()
    given = [(x, s) for x in call.tensors if (s := get_stream(x)) is not None]
    full = [(x, s) for x, s in given if x.numel() == size] or given
    projected = any(s.projected for _, s in full)
    terms = list(dict.fromkeys(s.term for _, s in full if s.projected == projected))
    if not terms:
        return [None]
    return [Stream(terms[0] if len(terms) == 1 else call.streams.term(call.name, *terms), projected)]


def projection(call: StreamCall) -> Found:
    """A product with weights, or of two streams: that which is of tokens, a term of both if both are."""
    return _projection(call, call.tensors)


def biased_projection(call: StreamCall) -> Found:
    """A product whose first operand is added to it."""
    return _projection(call, call.tensors[1:])


def _projection(call: StreamCall, tensors: Sequence[torch.Tensor]) -> Found:
    known = [s for x in _moved(tensors) if (s := get_stream(x)) is not None]
    terms = list(dict.fromkeys(s.term for s in known if s.projected)) or [s.term for s in known[:1]]
    if not terms:
        return [None]
    return [Stream(terms[0] if len(terms) == 1 else call.streams.term("product", *terms), True)]


def _moved(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Without the small square matrices, one for each token, by which the other operand is turned or moved.

    As RoPE's 2 x 2 and a camera's 4 x 4 do, they tell where tokens are and not whose.
    """
    if len(tensors) != 2 or min(x.dim() for x in tensors) < 3:
        return tensors
    kept = [x for x in tensors if not x.shape[-2] == x.shape[-1] <= MATRIX]
    return kept if len(kept) == 1 else tensors


def rows(dim_at: int, start_at: int | None = None) -> StreamRule:
    """Pieces of a dimension that follow each other; positions of the arguments `dim` and `start` are given.

    Without `start_at` the first piece begins at row 0.
    """

    def rule(call: StreamCall) -> Found:
        tensor = call.args[0]
        dim = call.dim(dim_at, tensor.dim())
        label, size = get_labels(tensor)[dim], tensor.shape[dim]
        start, step = 0, 1
        if start_at is not None:
            step = call.args[start_at + 2] if len(call.args) > start_at + 2 else 1
            start = (call.args[start_at] if len(call.args) > start_at else 0) or 0
            start = min(max(start + size if start < 0 else start, 0), size)
        found: Found = []
        for piece in call.outs:
            n = piece.shape[dim] if piece.dim() == tensor.dim() else 1
            found.append(_sliced(call, tensor, label, start, min(start + n, size), step))
            start += n
        return found

    return rule


def _sliced(call: StreamCall, tensor: torch.Tensor, label: Label, start: int, stop: int, step: int) -> Stream | None:
    """Stream of rows `start..stop` of a dimension with this label; of as many from `start` on, if `step` is not 1."""
    stream = get_stream(tensor)
    leaves = list(resolve(label))
    featured = bool(leaves) and leaves[0].feature
    while leaves and leaves[0].feature:
        leaves.pop(0)
    inner = label_size(tuple(leaves))
    if stream is None or (featured and inner and not (start % inner or stop % inner)):  # heads or q, k, v are chosen
        return stream
    size = label_size(label)
    if step != 1:
        return Stream(call.streams.some_of((stream.term,), "every", start, stop, step), stream.projected)
    term = call.streams.rows(stream.term, size, start, stop)
    if stop - start == 1 and call.streams.slice_of(term) is not None:
        call.streams.note_axis(term, label)
    return Stream(term, stream.projected)


def cat(call: StreamCall) -> Found:
    """Tensors one behind the other along a dimension."""
    rank = call.outs[0].dim()
    dim = call.dim(1, rank)
    return _joined(call, dim, [x.shape[dim] if x.dim() == rank else 0 for x in call.tensors])


def stack(call: StreamCall) -> Found:
    """Tensors one behind the other along a new dimension."""
    return _joined(call, call.dim(1, call.outs[0].dim()), [1] * len(call.tensors))


def _joined(call: StreamCall, dim: int, sizes: Sequence[int]) -> Found:
    given = [get_stream(x) for x in call.tensors]
    known = [s for s in given if s is not None]
    if not known:
        return [None]
    projected = any(s.projected for s in known)
    if all_one(call.tensors) and is_feature(get_labels(call.outs[0])[dim]):
        return [Stream(known[0].term, projected)]
    pieces: list[Row] = [(-1 if s is None else s.term, n) for s, n in zip(given, sizes, strict=True)]
    return [Stream(call.streams.joined(pieces), projected)]


def padded(call: StreamCall) -> Found:
    """Rows of nothing before and behind."""
    tensor, amounts = call.args[:2]
    stream = get_stream(tensor)
    if stream is None:
        return [None]
    for k in range(len(amounts) // 2):
        d = tensor.dim() - 1 - k
        if any(amounts[2 * k : 2 * k + 2]) and not is_feature(get_labels(tensor)[d]):
            pieces: list[Row] = [(-1, amounts[2 * k]), (stream.term, tensor.shape[d]), (-1, amounts[2 * k + 1])]
            stream = Stream(call.streams.joined([row for row in pieces if row[1] > 0]), stream.projected)
    return [stream]


def picked(call: StreamCall) -> Found:
    """Rows chosen by an index whose values are not known."""
    stream, by = get_stream(call.tensors[0]), get_stream(call.tensors[-1])
    if stream is None:
        return [by]
    return [Stream(call.streams.some_of((stream.term,), "picked", by.term if by else None), stream.projected)]


def row_write(call: StreamCall) -> Found:
    """The last operand is written into some rows of the first."""
    return [written(call.streams, get_stream(call.tensors[0]), None, get_stream(call.tensors[-1]))]
