"""Queries among the keys: where their tokens begin, what writes into a cache leave of it, which grids fit."""

from __future__ import annotations

import pytest
import torch

from dynamicrad_compile.passes.axes.among import asked_keys, cut, overlaps, with_earlier
from dynamicrad_compile.passes.axes.labels import Axis, Part, Source
from dynamicrad_compile.passes.axes.streams import Stream, Streams, written
from dynamicrad_compile.passes.axes.tensor_labels import Rows, rows_shown, set_base


def axis(size, node="x"):
    return (Axis(size, Source(node, 1, "input")),)


def joined(*parts):
    whole = Axis(sum(p.size for p in parts), Source("cat", 1, "op"))
    whole.parts = parts
    return (whole,)


def test_where_rows_of_a_term_begin():
    streams = Streams()
    x, cache, text = (streams.term(name) for name in ("x", "cache", "text"))
    keys = streams.joined([(text, 7), (cache, 20), (x, 10)])
    assert streams.starts(x, 10, keys, 37) == (27,)
    assert streams.starts(streams.rows(x, 10, 4, 9), 5, keys, 37) == (31,)
    assert streams.starts(streams.rows(x, 10, 4, 9), 5, x, 10) == (4,)
    assert streams.starts(streams.joined([(cache, 20), (x, 10)]), 30, keys, 37) == (7,)
    assert streams.starts(streams.term("other"), 10, keys, 37) == ()
    assert streams.starts(streams.rows(x, 12, 4, 9), 5, keys, 37) == ()  # rows of another tensor
    assert streams.starts(x, 10, streams.joined([(x, 10), (x, 10)]), 20) == (0, 10)
    both = streams.joined([(text, 7), (x, 10)])
    assert streams.starts(both, 17, streams.joined([(cache, 20), (both, 17)]), 37) == (20,)
    part = streams.joined([(text, 7), (streams.rows(x, 10, 4, 9), 5)])
    assert streams.starts(streams.rows(x, 10, 4, 9), 5, part, 12) == (7,)
    assert streams.starts(streams.rows(x, 10, 4, 8), 4, part, 12) == (7,)
    assert streams.starts(streams.rows(x, 10, 6, 8), 2, streams.rows(x, 10, 5, 9), 4) == (1,)
    assert streams.starts(streams.rows(x, 10, 2, 4), 2, streams.rows(x, 10, 5, 9), 4) == ()


def test_terms_that_may_have_rows_in_common():
    streams = Streams()
    x, y, text = (streams.term(name) for name in ("x", "y", "text"))
    first, last = streams.rows(x, 12, 0, 4), streams.rows(x, 12, 4, 12)
    assert streams.overlap(x, x)
    assert not streams.overlap(x, y)
    assert streams.overlap(first, x)
    assert not streams.overlap(first, last)
    assert streams.overlap(streams.rows(x, 12, 3, 5), last)
    assert streams.overlap(streams.rows(x, 3, 2, 3), first)  # rows of another dimension
    assert streams.overlap(streams.joined([(text, 7), (x, 12)]), streams.joined([(x, 12), (y, 2)]))
    assert not streams.overlap(streams.joined([(text, 7), (first, 4)]), streams.joined([(last, 8), (y, 2)]))
    assert streams.overlap(streams.some_of((y, first), "write"), first)
    assert not streams.overlap(streams.some_of((y, first), "write"), last)


def test_a_write_of_other_tokens_takes_the_place_of_rows():
    streams = Streams()
    cache, new = Stream(streams.term("cache"), False), Stream(streams.term("x"), True)
    view = Stream(streams.rows(cache.term, 20, 5, 8), False)
    after = written(streams, cache, view, new, Rows(1, 5, 8, 20))
    assert after == Stream(
        streams.joined(
            [(streams.rows(cache.term, 20, 0, 5), 5), (new.term, 3), (streams.rows(cache.term, 20, 8, 20), 12)]
        ),
        True,
    )
    assert streams.starts(new.term, 3, streams.rows(after.term, 20, 0, 8), 8) == (5,)
    rotated = Stream(view.term, True)  # the same tokens, written back
    assert written(streams, cache, view, rotated, Rows(1, 5, 8, 20)) == cache
    projected = Stream(view.term, True)
    assert written(streams, cache, projected, new, Rows(1, 5, 8, 20)).term == streams.term(
        "write", cache.term, new.term
    )


@pytest.mark.parametrize(
    ("view", "rows"),
    [
        (lambda x: x[:, 5:8], Rows(1, 5, 8, 20)),
        (lambda x: x[:, :8], Rows(1, 0, 8, 20)),
        (lambda x: x[:, ::2], None),
        (lambda x: x[:1, 5:8], None),
        (lambda x: x[:, 5:8].transpose(1, 2), None),
        (lambda x: x[0, 5:8], None),
        (lambda x: x[:], None),
    ],
)
def test_rows_that_a_view_shows(view, rows):
    base = torch.empty(2, 20, 3, 4)
    shown = view(base)
    set_base(shown, base)
    assert rows_shown(shown) == rows


def test_positions_must_agree_with_tokens():
    x, cache = axis(10), axis(20, "cache")
    key = joined(Part(cache, 0, 20), Part(x, 0, 10))
    assert asked_keys(x, key, (20,)) == (20, 30)
    assert asked_keys(x, key, (10,)) is None
    assert asked_keys(x, key, ()) is None
    assert asked_keys(x, joined(Part(x, 0, 10), Part(x, 0, 10)), (0, 10)) is None  # which of the two
    assert [p.size for p in cut(key, (20, 30))] == [20, 10]
    assert [p.size for p in cut(key, (24, 28))] == [20, 4, 4, 2]
    assert [overlaps(cut(key, (24, 28)), at, (24, 28)) for at in range(4)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("grid", "shown", "expected"),
    [
        ((6, 2, 2), (None, None, (2, 2, 2)), (8, 32)),
        ((8, 2, 2), (None, None, (2, 2, 2)), (0, 32)),
        ((7, 2, 2), (None, None, (2, 2, 2)), None),  # begins inside a piece
        ((8, 2, 2), (None, None, (2, 1, 4)), None),  # frames of another size
        ((8, 2, 2), ((2, 1, 4), None, None), None),
        ((4, 2, 4), (None, None, None), (0, 32)),
        ((2, 2, 2), (None, None, (2, 2, 2)), None),  # no earlier frames
        ((9, 2, 2), (None, None, (2, 2, 2)), None),
    ],
)
def test_grids_of_all_frames_that_end_with_the_queries(grid, shown, expected):
    pieces = [Part(axis(8), 0, 8), Part(axis(16), 0, 16), Part(axis(8), 0, 8)]
    assert with_earlier(pieces, (24, 32), grid, shown) == expected
