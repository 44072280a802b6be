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

from .labels import Label, Peers, label_size, resolve
from .tensor_labels import Rows


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
        self._held: dict[int, tuple[int, int, int, int]] = {}  # as `_slices`, of what several processes hold together
        self._axes: dict[int, Label] = {}
        self._holds: dict[int, tuple[int, ...]] = {}

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
        outer = self._slices.get(term)
        if outer is not None and outer[3] - outer[2] == size:
            return self.rows(outer[0], outer[1], outer[2] + start, outer[2] + stop)
        number = self.term("rows", term, size, start, stop)
        self._slices[number] = (term, size, start, stop)
        return number

    def starts(self, term: int, size: int, whole: int, length: int) -> tuple[int, ...]:
        """Where among the `length` rows of a term `whole` the `size` rows of a term begin; none where they do not."""
        pieces = self._rows.get(whole, ((whole, length),))
        if sum(n for _, n in pieces) != length:
            return ()
        first = self._rows.get(term, ((term, size),))[0][0]
        slices = [self._held[term]] if term in self._held else []
        slices += [self._slices[one] for one in dict.fromkeys((term, first)) if one in self._slices]
        found, place = [], 0
        for piece, n in pieces:
            if piece in (term, first):
                found.append(place)
            base, size_of_base, origin = self._slices.get(piece, (piece, n, 0, n))[:3]
            found += [place + s[2] - origin for s in slices if s[:2] == (base, size_of_base) and s[2] >= origin]
            place += n
        fitting = [start for start in dict.fromkeys(found) if start + size <= length]
        return tuple(start for start in fitting if self.rows(whole, length, start, start + size) == term)

    def some_of(self, terms: Sequence[int], *key: Any) -> int:
        """A term of rows of these terms; which ones is not known."""
        number = self.term(*key, *terms)
        self._holds[number] = tuple(terms)
        return number

    def overlap(self, one: int, other: int) -> bool:
        """Whether two terms may have rows of one tensor in common."""
        return any(
            a[0] == b[0] and (not a[1] or a[1] != b[1] or max(a[2], b[2]) < min(a[3], b[3]))
            for a in self._spans(one)
            for b in self._spans(other)
        )

    def _spans(self, term: int) -> list[tuple[int, int, int, int]]:
        """(tensor, its rows, start, stop) of what the rows of a term may be; 0 rows: any of it."""
        todo, seen, spans = [term], set[int](), []
        while todo:
            one = todo.pop()
            inner = [piece for piece, _ in self._rows.get(one, ()) if piece >= 0] or self._holds.get(one, (-1,))
            if one in seen or one < 0:
                continue
            seen.add(one)
            if max(inner) < 0:
                spans.append(self._slices.get(one, (one, 0, 0, 0)))
                base = spans[-1][0]
                todo += [base] if base in self._rows or base in self._holds else []
            todo += inner
        return spans

    def whole_of(self, term: int, peers: Peers, size: int) -> int:
        """A term of the rows of all peers, of which a term is the `size` rows that this process has."""
        start = peers.rank * size
        known = self._slices.get(term)
        if known is not None and known[1:] == (size * peers.size, start, start + size):
            return known[0]
        number = self.term("gathered", term, peers)
        rows = (number, size * peers.size, start, start + size)
        self._numbers.setdefault(("rows", *rows), term)
        self._held[term] = rows
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
        for piece, n in (inner for row in pieces for inner in self._pieces_of(*row)):
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

    def _pieces_of(self, term: int, size: int) -> tuple[Row, ...]:
        """What `size` rows of a term are put together from: itself, where that is not known."""
        pieces = self._rows.get(term, ())
        return pieces if sum(n for _, n in pieces) == size else ((term, size),)


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


def overwrites(view: Stream | None, new: Stream | None) -> bool:
    """Whether a write puts other tokens in the place of those that a tensor came with, as into a cache of keys."""
    return view is not None and new is not None and not view.projected and view.term != new.term


def written(
    streams: Streams, before: Stream | None, view: Stream | None, new: Stream | None, rows: Rows | None = None
) -> Stream | None:
    """Stream of a tensor after `new` was written into `view`, a part of it; rows: where, if that is known."""
    if new is None or before == new or (view is not None and view.term == new.term):
        return before
    if before is None:
        return new
    if rows is not None and overwrites(view, new):
        kept = ((0, rows.start), (rows.stop, rows.size))
        front, behind = ([(streams.rows(before.term, rows.size, *r), r[1] - r[0])] if r[0] < r[1] else [] for r in kept)
        pieces = [*front, (new.term, rows.stop - rows.start), *behind]
        return Stream(streams.joined(pieces), before.projected or new.projected)
    return Stream(streams.some_of((before.term, new.term), "write"), before.projected or new.projected)
