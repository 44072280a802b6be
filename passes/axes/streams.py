"""Which tokens a tensor's rows are, apart from how they are arranged.

Two videos that are rotated by one RoPE table have the same axes, but attention from one to the other is no
self-attention. So each tensor carries a *stream*: a term that says from which tensors its rows were computed, token
by token, by which steps. Weights, tables and steps that look at one tensor only don't count. Query and key of a
self-attention come from one tensor by the same steps, so their streams are equal; if streams differ, somebody else's
tokens came in.

A stream is a small number; equal terms have equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from .labels import Label, label_size, resolve
from .tensor_labels import get_labels


class Stream(NamedTuple):
    """A term, and whether it has gone through a projection (RoPE tables have not, tokens have)."""

    term: int
    projected: bool


Row = tuple[int, int]  # (term, rows); term -1: rows of nothing, such as padding


class Streams:
    """The terms of one graph."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._rows: dict[int, tuple[Row, ...]] = {}
        self._slices: dict[int, tuple[int, int, int, int]] = {}
        self._axes: dict[int, Label] = {}

    def term(self, *key: Any) -> int:
        """The number of a term."""
        return self._numbers.setdefault(key, len(self._numbers))

    def rows(self, term: int, size: int, start: int, stop: int) -> int:
        """Rows `start..stop` of a term with `size` rows; pieces of a concatenation are found again."""
        if (start, stop) == (0, size):
            return term
        pieces = self._rows.get(term)
        if pieces is not None and sum(n for _, n in pieces) == size:
            found: list[Row] = []
            offset = 0
            for piece, n in pieces:
                low, high = max(start, offset), min(stop, offset + n)
                if low < high:
                    inner = piece if piece < 0 else self.rows(piece, n, low - offset, high - offset)
                    found.append((inner, high - low))
                offset += n
            return self.joined(found)
        number = self.term("rows", term, size, start, stop)
        self._slices[number] = (term, size, start, stop)
        return number

    def slice_of(self, term: int) -> tuple[int, int, int, int] | None:
        """(term, size, start, stop) of which a term is rows; None if it is none."""
        return self._slices.get(term)

    def note_axis(self, term: int, axis: Label) -> None:
        """Note of which axis a term is one row; () once it is of two."""
        known = self._axes.setdefault(term, axis)
        if known is not axis and resolve(known) != resolve(axis):
            self._axes[term] = ()

    def rows_one_by_one(self, terms: Sequence[int | None]) -> Label:
        """The axis whose rows these terms are, each one row, all of them and in order; () if they are not."""
        slices = [None if term is None else self._slices.get(term) for term in terms]
        first = slices[0]
        if first is None or slices != [(*first[:2], i, i + 1) for i in range(first[1])]:
            return ()
        axes = {resolve(self._axes.get(term or 0, ())) for term in terms}
        axis = axes.pop()
        return axis if not axes and label_size(axis) == len(terms) else ()

    def joined(self, pieces: Sequence[Row]) -> int:
        """A concatenation; neighbouring rows of one term are put together again."""
        glued: list[Row] = []
        for piece, n in pieces:
            last = self._slices.get(glued[-1][0]) if glued else None
            this = self._slices.get(piece)
            if last and this and last[:2] == this[:2] and last[3] == this[2]:
                glued[-1] = (self.rows(last[0], last[1], last[2], this[3]), glued[-1][1] + n)
            else:
                glued.append((piece, n))
        if len(glued) == 1:
            return glued[0][0]
        number = self.term("joined", *glued)
        self._rows[number] = tuple(glued)
        return number


def get_stream(tensor: torch.Tensor) -> Stream | None:
    """Stream of a tensor; None for weights, tables made in the graph and other constants."""
    return getattr(tensor, "_drad_stream", None)


def set_stream(tensor: torch.Tensor, stream: Stream | None) -> None:
    """Attach a stream."""
    tensor._drad_stream = stream


def is_feature(label: Label) -> bool:
    """Whether a dimension is made of the outputs of a projection (heads, channels, query-key-value)."""
    leaves = resolve(label)
    return bool(leaves) and all(leaf.feature for leaf in leaves)


def same_program(streams: Streams, name: str, tensors: Sequence[torch.Tensor], size: int) -> Stream | None:
    """Stream of an elementwise operation: the operand that has tokens, a term of all of them if several have."""
    given = [(x, s) for x in tensors if (s := get_stream(x)) is not None]
    full = [(x, s) for x, s in given if x.numel() == size] or given
    projected = any(s.projected for _, s in full)
    terms = list(dict.fromkeys(s.term for _, s in full if s.projected == projected))
    if not terms:
        return None
    return Stream(terms[0] if len(terms) == 1 else streams.term(name.rstrip("_"), *terms), projected)


def projection(tensors: Sequence[torch.Tensor]) -> Stream | None:
    """Stream of a product with weights, or of two streams: the first that is of tokens, else the first."""
    known = [s for x in tensors if (s := get_stream(x)) is not None]
    first = next((s for s in known if s.projected), known[0] if known else None)
    return None if first is None else Stream(first.term, True)


def sliced(streams: Streams, tensor: torch.Tensor, label: Label, size: int, start: int, stop: int) -> Stream | None:
    """Stream of rows `start..stop` of a dimension of `size`."""
    stream = get_stream(tensor)
    leaves = list(resolve(label))
    featured = bool(leaves) and leaves[0].feature
    while leaves and leaves[0].feature:
        leaves.pop(0)
    inner = label_size(tuple(leaves))
    if stream is None or (featured and inner and not (start % inner or stop % inner)):  # heads or q, k, v are chosen
        return stream
    term = streams.rows(stream.term, size, start, stop)
    if stop - start == 1 and streams.slice_of(term) is not None:
        streams.note_axis(term, label)
    return Stream(term, stream.projected)


def all_one(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all these tensors are of the same tokens."""
    terms = {None if (s := get_stream(x)) is None else s.term for x in tensors}
    return len(terms) == 1 and None not in terms


def packed(streams: Streams, operands: Sequence[Stream | None]) -> bool:
    """Whether query, key and value are the three thirds of one tensor that was projected outside the graph."""
    slices = [None if s is None or s.projected else streams.slice_of(s.term) for s in operands]
    first = slices[0]
    if first is None or first[1] % 3:
        return False
    third = first[1] // 3
    return slices == [(*first[:2], i * third, (i + 1) * third) for i in range(3)]


def attended(streams: Streams, query: Stream | None, key: Stream | None) -> Stream | None:
    """Stream of the output of an attention; `key` is None where keys are the same tokens as queries."""
    if query is None or key is None:
        return query
    return Stream(streams.term("attention", query.term, key.term), query.projected or key.projected)


def joined(streams: Streams, tensors: Sequence[torch.Tensor], label: Label, sizes: Sequence[int]) -> Stream | None:
    """Stream of a concatenation along a dimension of this label."""
    given = [get_stream(x) for x in tensors]
    known = [s for s in given if s is not None]
    if not known:
        return None
    projected = any(s.projected for s in known)
    if all_one(tensors) and is_feature(label):
        return Stream(known[0].term, projected)
    rows = [(-1 if s is None else s.term, n) for s, n in zip(given, sizes, strict=True)]
    return Stream(streams.joined(rows), projected)


def picked(streams: Streams, tensor: torch.Tensor, index: torch.Tensor) -> Stream | None:
    """Stream of rows chosen by an index whose values are not known."""
    stream, by = get_stream(tensor), get_stream(index)
    if stream is None:
        return by
    return Stream(streams.term("picked", stream.term, by.term if by else None), stream.projected)


def written(streams: Streams, before: Stream | None, view: Stream | None, new: Stream | None) -> Stream | None:
    """Stream of a tensor after `new` was written into `view`, a part of it."""
    if new is None or before == new or (view is not None and view.term == new.term):
        return before
    if before is None:
        return new
    return Stream(streams.term("write", before.term, new.term), before.projected or new.projected)


def streams_of(
    streams: Streams, func: Any, out: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Stream | None]:
    """Streams of the outputs of an operation, before anything is written in place."""
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if not tensors:
        return [None] * len(outs)
    first = tensors[0]
    if name in _SLICES and isinstance(args[0], torch.Tensor):
        return _slices(streams, name, outs, args, kwargs)
    if name in ("cat", "concat", "stack"):
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(outs[0].dim(), 1)
        sizes = [1 if name == "stack" else x.shape[dim] if x.dim() == outs[0].dim() else 0 for x in tensors]
        return [joined(streams, tensors, get_labels(outs[0])[dim], sizes)]
    if name == "constant_pad_nd":
        return [_padded(streams, first, args[1])]
    if name in _PRODUCTS:
        return [projection(tensors[1:] if name in ("addmm", "baddbmm") else tensors)]
    if name == "embedding":
        return [get_stream(tensors[-1])]
    if name in ("index_select", "index", "gather"):
        return [picked(streams, first, tensors[-1])]
    if name == "copy_":
        return [get_stream(tensors[-1]) or get_stream(first)]
    if name in _ROW_WRITES:
        return [written(streams, get_stream(first), None, get_stream(tensors[-1]))]
    if torch.Tag.pointwise in func.tags or name in _POINTWISE:
        return [same_program(streams, name, tensors, outs[0].numel())]
    return [get_stream(first)] * len(outs)


_SLICES = ("slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "_convolution")
_POINTWISE = ("complex", "polar", "where")
_ROW_WRITES = (
    "index_put", "index_put_", "index_copy", "index_copy_", "scatter", "scatter_", "slice_scatter",
    "select_scatter", "masked_scatter", "index_add", "scatter_add", "index_add_", "scatter_add_",
)  # fmt: skip


def _slices(
    streams: Streams, name: str, outs: Sequence[torch.Tensor], args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Stream | None]:
    tensor = args[0]
    at = 2 if name.endswith(("split", "split_with_sizes")) else 1
    dim = (args[at] if len(args) > at else kwargs.get("dim", 0)) % max(tensor.dim(), 1)
    label, size = get_labels(tensor)[dim], tensor.shape[dim]
    start, found = 0, []
    if name in ("slice", "select"):
        start = (args[2] if len(args) > 2 else 0) or 0
        start = min(max(start + size if start < 0 else start, 0), size)
    for piece in outs:
        n = piece.shape[dim] if piece.dim() == tensor.dim() else 1
        found.append(sliced(streams, tensor, label, size, start, min(start + n, size)))
        start += n
    return found


def _padded(streams: Streams, tensor: torch.Tensor, amounts: Sequence[int]) -> Stream | None:
    stream = get_stream(tensor)
    if stream is None:
        return None
    for k in range(len(amounts) // 2):
        d = tensor.dim() - 1 - k
        if any(amounts[2 * k : 2 * k + 2]) and not is_feature(get_labels(tensor)[d]):
            rows = [(-1, amounts[2 * k]), (stream.term, tensor.shape[d]), (-1, amounts[2 * k + 1])]
            stream = Stream(streams.joined([row for row in rows if row[1] > 0]), stream.projected)
    return stream
