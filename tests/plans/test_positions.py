"""Grids read from the values of position tables, on the host and when a graph runs: each grid its own plan."""

from __future__ import annotations

import itertools

import pytest
import torch

from dynamicrad_compile.plans import layout, positions_op
from dynamicrad_compile.plans.op import dense_table, full_table
from dynamicrad_compile.plans.positions import decode_table, first_in_line, frames_in, shows
from dynamicrad_compile.plans.positions_op import MAX_READS, Book, plan_of_positions_op
from dynamicrad_compile.plans.table import PlanSpec, RegimeSpec
from dynamicrad_compile.profiles.parameters import StaticRatio

SPEC = PlanSpec("dynamicrad", 16, (RegimeSpec("mid", StaticRatio(sparsity=0.6)),))
SAME_LENGTH = [(5, 6, 8), (5, 8, 6), (3, 8, 10), (10, 4, 6), (1, 15, 16), (2, 12, 10), (5, 48, 1)]
CPU = torch.device("cpu")


def table(grid, order=(0, 1, 2)):
    """Cosines and sines of two frequencies for each axis, [tokens, 12]; `order` says which axis has which columns."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    angles = torch.cat([places[:, d, None] * torch.tensor([1.0, 0.01]) for d in order], 1)
    return torch.cat([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("grid", [(5, 6, 8), (2, 3, 2), (7, 5, 3)])
def test_a_table_shows_its_grid(grid, order):
    assert decode_table(table(grid, order)).grid == grid
    assert decode_table(table(grid, order), single_frame=True) == decode_table(table(grid, order))


def test_a_single_frame_is_a_grid_only_if_asked_for_and_with_a_column_for_frames():
    frame = table((1, 6, 8))
    assert decode_table(frame) is None
    assert decode_table(frame, single_frame=True).grid == (1, 6, 8)
    assert decode_table(frame[:, [2, 3, 4, 5, 8, 9, 10, 11]], single_frame=True) is None


@pytest.mark.parametrize("values", [torch.zeros(48, 6), torch.arange(48.0)[:, None].repeat(1, 6), torch.randn(48, 6)])
def test_other_tables_show_no_grid(values):
    assert decode_table(values, single_frame=True) is None


def test_of_grids_with_as_many_tokens_a_table_shows_its_own_alone():
    grids = SAME_LENGTH[:6]
    found = [decode_table(table(grid), single_frame=True) for grid in grids]
    columns = torch.tensor([one.columns for one in found]).T
    lines = torch.stack([first_in_line(grid) for grid in grids], -1)
    for k, grid in enumerate(grids):
        assert shows(table(grid), columns, lines).nonzero().flatten().tolist() == [k]


@pytest.mark.parametrize("text", [(0, 0), (5, 0), (3, 9)])
def test_each_grid_gets_its_own_plan_in_any_order(text):
    length = 240 + sum(text)
    for order in itertools.islice(itertools.permutations(SAME_LENGTH), 0, None, 840):
        positions_op._book.cache_clear()
        for grid in (*order, *order):
            found = plan_of_positions_op(torch.empty(0), table(grid)[None, :, None], 1, text[0], length, SPEC.to_json())
            is_video = min(grid) > 1 and grid[0] > 2
            expected = full_table(SPEC, grid, *text) if is_video else dense_table(SPEC, length)
            for tensor, wanted in zip(found, expected, strict=True):
                assert torch.equal(tensor, wanted)


def test_a_sequence_that_is_too_long_for_a_pattern_runs_dense(monkeypatch):
    monkeypatch.setattr(layout, "MAX_BLOCKS", 14)
    for found, dense in zip(full_table(SPEC, (5, 6, 8), 0, 0), dense_table(SPEC, 240), strict=True):
        assert torch.equal(found, dense)


def test_a_table_is_read_once_a_grid(monkeypatch):
    book, reads = Book(SPEC, 240, (0, 0), CPU, CPU), []
    monkeypatch.setattr(
        positions_op, "decode_table", lambda *args, **how: reads.append(1) or decode_table(*args, **how)
    )
    for grid in [(5, 6, 8), (5, 6, 8), (5, 8, 6), (5, 6, 8), (5, 8, 6)]:
        book.plan(table(grid))
    assert len(reads) == 2
    for _ in range(2 * MAX_READS):
        assert torch.equal(book.plan(torch.randn(240, 12))[0], dense_table(SPEC, 240)[0])
    assert len(reads) == MAX_READS


def test_where_reading_would_wait_an_unknown_grid_is_dense_until_a_flag_tells(monkeypatch):
    """A stand-in for a GPU: the flag is set as the device would set it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    book = Book(SPEC, 240, (0, 0), CPU, CPU)
    book.missed = torch.zeros(1, dtype=torch.bool)
    dense, sparse = dense_table(SPEC, 240)[0], {g: full_table(SPEC, g, 0, 0)[0] for g in SAME_LENGTH[:3]}
    assert torch.equal(book.plan(table((5, 6, 8)))[0], sparse[5, 6, 8])  # the first of its length is read
    assert torch.equal(book.plan(table((5, 8, 6)))[0], sparse[5, 8, 6])  # its transpose is known
    assert book.reads == 1
    assert torch.equal(book.plan(table((3, 8, 10)))[0], dense)
    assert book.reads == 1
    assert torch.equal(book.plan(table((3, 8, 10)))[0], sparse[3, 8, 10])
    assert torch.equal(book.plan(table((5, 6, 8)))[0], sparse[5, 6, 8])
    assert book.reads == 2


def test_the_operator_is_well_behaved():
    arguments = (torch.empty(0), table((5, 6, 8)), 0, 3, 250, SPEC.to_json())
    torch.library.opcheck(torch.ops.dynamicrad.plan_of_positions.default, arguments)
    with torch.inference_mode():
        plan_of_positions_op(*arguments[:4], 251, arguments[5])
    plan_of_positions_op(*arguments[:4], 251, arguments[5])


def at_times(times, kind):
    """A table of 6 x 8 places at each time: the three numbers of a token, or their sines and cosines."""
    numbers = torch.cartesian_prod(torch.tensor(times).float(), torch.arange(6.0), torch.arange(8.0))
    if kind == "numbers":
        return numbers
    angles = (numbers[:, :, None] * 0.1 ** torch.arange(1 if kind == "one frequency" else 4)).flatten(1)
    both = torch.cat([angles.cos(), angles.sin()], 1)
    return both.bfloat16() if kind == "bf16" else both


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((0, 1, 2, 3, 4), (0, 0)),
        ((0, 1, 2), (0, 0)),
        ((0, 0.04, 0.37, 0.7, 1.03), (0, 0)),  # a first frame that lasts shorter
        ((7, 8, 9, 10, 11, 12), (0, 0)),
        ((4, 3, 2, 1, 0), (0, 0)),
        ((0, 1, 2, 3, -1), None),  # pictures with numbers: the last has the number before the first
        ((0, 1, 2, 3, 4, 5, -1), None),
        ((0, 1, 1, 1, 1), None),
        ((0, 1, 2, 3, 4, 10), (0, 1)),
        ((0, 1, 2, 3, 4, 30), (0, 1)),
        ((*range(20), 30), (0, 1)),
        ((30, 0, 1, 2, 3, 4), (1, 0)),
        ((0, 2, 3, 4, 5, 6), (1, 0)),  # the first lasts longer
        ((-5, -9, 0, 1, 2, 3, 4, 5, 30), (2, 1)),
        ((0, 1, 2, 3, 4, 5, 20, 22, 24), (0, 3)),
        ((0, 1, 2, 3, 4, 2), (0, 1)),
        ((0, 1, 2, 30, 3, 4, 5, 6), None),
        ((0, 1, 2, 3, 4, 20, 21, 22), None),  # more references than half of the frames
        ((0, 1, -1), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["numbers", "sines", "bf16"])
def test_frames_follow_each_other_in_time(times, expected, kind):
    values = at_times(times, kind)
    found = decode_table(values)
    assert found.grid == (len(times), 6, 8)
    assert found.around == expected
    if expected is not None:
        assert frames_in(values, found.grid, *found.checked)


def test_few_numbered_frames_run_dense():
    values = at_times((0, 1, 2, 3), "numbers")
    found = Book(SPEC, len(values), (0, 0), CPU, CPU).plan(values)
    assert torch.equal(found[0], dense_table(SPEC, len(values))[0])


def test_a_single_frequency_is_enough():
    for times, expected in (((0, 1, 2, 3, 4), (0, 0)), ((0, 1, 2, 3, -1), None)):
        assert decode_table(at_times(times, "one frequency")).around == expected


@pytest.mark.parametrize("kind", ["numbers", "sines"])
def test_pictures_run_dense_before_and_after_a_video_of_the_same_size(kind):
    video = at_times((0, 1, 2, 3, 4), kind)
    book = Book(SPEC, len(video), (0, 0), CPU, CPU)
    dense, sparse = dense_table(SPEC, 240)[0], full_table(SPEC, (5, 6, 8), 0, 0)[0]
    for times in ((0, 1, 2, 3, -1), (0, 1, 1, 1, 1)):
        for values, wanted in ((at_times(times, kind), dense), (video, sparse), (at_times(times, kind), dense)):
            assert torch.equal(book.plan(values)[0], wanted)
