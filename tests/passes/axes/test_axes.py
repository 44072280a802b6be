"""The axis algebra: products, splits, concatenations and what is learnt when two labels meet."""

from __future__ import annotations

import pytest

from dynamicrad_compile.passes.axes.alignment import unify
from dynamicrad_compile.passes.axes.concatenation import concat, parts_of, same, slice_label
from dynamicrad_compile.passes.axes.labels import (
    Axis,
    Part,
    Source,
    are_mirrored,
    coarsest,
    label_size,
    mirrored,
    mixed,
    resolve,
)
from dynamicrad_compile.passes.axes.reshape import reshape


def axis(size, node="x", dim=0, kind="op", rank=0):
    return Axis(size, Source(node, dim, kind, rank))


SRC = Source("op", 0, "op")


def sizes(label):
    return [a.size for a in resolve(label)]


def test_merge_and_split_give_the_same_axes_back():
    b, f, hw = axis(2), axis(5), axis(48)
    (merged,) = reshape([(b,), (f,), (hw,)], [480], SRC)
    assert [resolve(label) for label in reshape([merged], [2, 5, 48], SRC)] == [(b,), (f,), (hw,)]


def test_split_of_an_unknown_axis_is_learnt_everywhere():
    s = axis(240)
    elsewhere = (s,)
    reshape([(s,)], [5, 6, 8], SRC)
    assert sizes(elsewhere) == [5, 6, 8]


def test_halves_side_by_side_are_the_whole_again():
    h = axis(12)
    halves = reshape([(h,)], [6, 2], SRC)
    assert coarsest((*halves[0], *halves[1])) == (h,)
    assert len(coarsest(halves[0])) == 1


def test_reshape_that_cuts_across_axes_goes_on_behind_them():
    a, b, c = axis(6), axis(10), axis(7)
    labels = reshape([(a,), (b,), (c,)], [4, 15, 7], SRC)
    assert resolve(labels[2]) == (c,)
    assert resolve(labels[0])[0].conflict
    assert resolve(labels[0])[0] not in (a, b)


@pytest.mark.parametrize("shape", [[0, 5], [5, 0, 3]], ids=["leading", "inner"])
def test_reshape_with_empty_dimensions(shape):
    labels = reshape([(axis(0),)], shape, SRC)
    assert [label_size(label) for label in labels] == shape


def test_unify_splits_the_coarser_side():
    s, f, h, w = axis(240), axis(5), axis(6), axis(8)
    unify((s,), (f, h, w), "mul")
    assert sizes((s,)) == [5, 6, 8]
    assert same((s,), (f, h, w))


def test_unify_keeps_the_latent_input():
    latent, table = axis(5, "latents", 2, "input", 5), axis(5, "arange", 0)
    unify((table,), (latent,), "mul")
    assert resolve((table,)) == (latent,)


def test_structures_that_contradict_each_other_are_mixed_and_keep_what_they_were():
    f, hw, wrong, rest = axis(5), axis(48), axis(48), axis(5)
    both = unify((f, hw), (wrong, rest), "add_3")
    assert "add_3" in mixed(both).text
    assert (resolve((f, hw)), resolve((wrong, rest))) == ((f, hw), (wrong, rest))
    assert mixed(unify((f, hw), both, "add_4"))
    assert sizes((f, hw)) == [5, 48]


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("shape", [(5, 6, 8), (4, 6, 6), (2, 4, 8), (4, 4, 4)])
def test_the_same_axes_in_another_order_are_mixed(shape, order):
    axes = tuple(axis(n) for n in shape)
    assert mixed(unify(axes, tuple(axes[d] for d in order), "add"))
    assert resolve(axes) == axes


def test_a_free_axis_takes_what_it_meets_and_tells_nothing():
    f, h, w, free = axis(5), axis(6), axis(8), axis(240)
    free.free = True
    columns = reshape([(free,)], [5, 8, 6], SRC)
    (turned,) = reshape([columns[0], columns[2], columns[1]], [240], SRC)
    for first, second in ((turned, (f, h, w)), ((f, h, w), turned)):
        assert resolve(unify(first, second, "add")) == (f, h, w)
    assert sizes((f, h, w)) == [5, 6, 8]


def test_caches_of_several_layers_and_the_frames_behind_them_are_one_table():
    f, h, w, whole = axis(2), axis(6), axis(8), tuple(axis(n) for n in (5, 6, 8))
    for node in ("mul", "mul_1"):
        joined = concat([Part((axis(144),), 0, 144), Part((f, h, w), 0, 96)], SRC)
        assert not mixed(unify(joined, whole, node))
        assert same(joined, whole)
        assert same(slice_label(joined, 144, 240, SRC), (f, h, w))
    moved = concat([Part((axis(96),), 0, 96), Part((f, h, w), 0, 96), Part((axis(48),), 0, 48)], SRC)
    unify(moved, whole, "mul_2")
    assert not same(moved, whole)  # they are frames 3 and 4


@pytest.mark.parametrize("table", [(5, 8, 6), (2, 15, 8)])
def test_frames_behind_a_cache_are_no_rows_of_other_frames(table):
    joined = concat([Part((axis(144),), 0, 144), Part((axis(2), axis(6), axis(8)), 0, 96)], SRC)
    assert mixed(unify(joined, tuple(map(axis, table)), "mul"))


def test_padding_is_alike_until_something_is_written_into_it():
    video, one, other, written = (axis(5), axis(48)), axis(16), axis(16), axis(16)
    one.blank = other.blank = True
    first, second, third = (concat([Part(video, 0, 240), Part((pad,), 0, 16)], SRC) for pad in (one, other, written))
    assert same(first, second)
    assert not same(first, third)


def test_concat_slice_and_glue():
    text, f, hw = axis(7), axis(5), axis(48)
    video = (f, hw)
    joined = concat([Part((text,), 0, 7), Part(video, 0, 240)], SRC)
    assert label_size(joined) == 247
    assert resolve(slice_label(joined, 7, 247, SRC)) == video
    first, rest = slice_label(video, 0, 48, SRC), slice_label(video, 48, 240, SRC)
    glued = concat([*parts_of(first), *parts_of(rest)], SRC)
    assert resolve(glued) == video
    swapped = concat([*parts_of(rest), *parts_of(first)], SRC)
    assert resolve(swapped) != video


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in front", "behind"])
def test_a_picture_beside_frames_is_one_more_frame_of_a_table(order):
    f, h, w, y, x = (axis(n, kind="input", dim=d, rank=4) for d, n in enumerate((5, 6, 8, 6, 8)))
    pieces = [((y, x), 48), ((f, h, w), 240)]
    tokens = concat([Part(label, 0, n) for label, n in (pieces[i] for i in order)], SRC)
    table = (axis(6), axis(6), axis(8))
    assert not mixed(unify(tokens, table, "rope"))
    assert resolve(tokens)[1:] == resolve((h, w)) == resolve((y, x)) == resolve(table[1:])
    at = 48 if order == (0, 1) else 0
    assert resolve(slice_label(tokens, at, at + 240, SRC)) == resolve((f, h, w))
    assert mixed(unify(concat([Part((axis(7),), 0, 7), Part((f, h, w), 0, 240)], SRC), (axis(19), axis(13)), "x"))


def test_slice_across_pieces_keeps_partial_pieces():
    a, b = axis(10), axis(20)
    joined = concat([Part((a,), 0, 10), Part((b,), 0, 20)], SRC)
    middle = parts_of(slice_label(joined, 4, 15, SRC))
    assert [(p.start, p.stop) for p in middle] == [(4, 10), (0, 5)]
    assert not same(slice_label(joined, 4, 15, SRC), slice_label(joined, 5, 16, SRC))


def test_two_concatenations_of_the_same_pieces_are_the_same():
    a, b = axis(3), axis(4)
    one = concat([Part((a,), 0, 3), Part((b,), 0, 4)], SRC)
    two = concat([Part((a,), 0, 3), Part((b,), 0, 4)], SRC)
    other = concat([Part((b,), 0, 4), Part((a,), 0, 3)], SRC)
    assert same(one, two)
    assert not same(one, other)


def test_a_reversed_axis_is_another_until_it_is_reversed_again():
    f, hw, s = axis(5), axis(48), axis(240)
    video = (f, hw)
    back = mirrored(video, SRC)
    assert not same(video, back)
    assert mirrored(back, SRC) == video
    unify(video, back, "add")
    assert not same(video, back)
    unify((s,), back, "add_1")
    assert same((s,), back)
    unify((s,), video, "add_2")
    assert not same((s,), video)


def test_parts_of_a_reversed_axis_are_reversed_too():
    s = axis(240)
    back = mirrored((s,), SRC)
    f, h, w = axis(5), axis(6), axis(8)
    unify((s,), (f, h, w), "mul")
    unify(back, (f, h, w), "mul_1")
    assert are_mirrored((s,), back)
    assert not same((s,), back)


def test_pieces_are_mixed_where_one_of_them_stands_elsewhere():
    text, video = axis(7), (axis(5), axis(6))

    def pieces(*labels):
        return concat([Part(label, 0, label_size(label)) for label in labels], SRC)

    unknown = pieces((axis(3),), (axis(34),))
    assert not mixed(unify(pieces((text,), video), unknown, "mul"))
    assert mixed(unify(pieces((text,), video), pieces(video, (text,)), "add"))


def test_axes_whose_rows_are_aligned_piece_by_piece_are_the_same():
    """As where queries and keys are cut into text and video, and the table of their positions, too."""
    tokens, table = axis(249), axis(249, "table", kind="input")
    rows = [slice_label((one,), start, stop, SRC) for one in (tokens, table) for start, stop in ((0, 9), (9, 249))]
    unify(rows[0], rows[2], "rope")
    unify(rows[1], rows[3], "rope")
    assert same((tokens,), (table,))
    assert [part.size for part in parts_of((tokens,))] == [9, 240]
    assert same(rows[1], slice_label((table,), 9, 249, SRC))


def test_rows_of_a_table_that_lie_over_each_other_stay_apart():
    """As the first rows of one table of angles, for frames, rows and columns."""
    table, frames, height = axis(27, "table"), axis(8, "f", kind="input"), axis(6, "h", kind="input")
    unify((frames,), slice_label((table,), 0, 8, SRC), "rope")
    unify((height,), slice_label((table,), 0, 6, SRC), "rope")
    for one in (frames, height):
        assert resolve((one,)) == (one,)
        assert one.parts is None
