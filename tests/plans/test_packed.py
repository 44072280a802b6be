"""Videos among text, audio and pictures, found in the positions of all tokens; and which times are those of frames."""

from __future__ import annotations

import random

import pytest
import torch
from support.packings import frame_times, packed, places, tables

from dynamicrad_compile.plans.op import dense_table, full_table
from dynamicrad_compile.plans.packed import find_video, shows_video
from dynamicrad_compile.plans.positions_op import Book, plan_of_positions_op
from dynamicrad_compile.plans.steps import go_on, longest_run
from dynamicrad_compile.plans.table import PlanSpec, RegimeSpec
from dynamicrad_compile.profiles.parameters import StaticRatio

SPEC = PlanSpec("dynamicrad", 16, (RegimeSpec("mid", StaticRatio(sparsity=0.6)),))
CPU = torch.device("cpu")
KINDS = ["numbers", "cosines", "sines"]


@pytest.mark.parametrize(
    ("times", "run"),
    [
        ((0, 1, 2, 3, 4), (0, 5)),
        ((7, 6, 5), (0, 3)),
        ((0, 1, 9, 17, 25), (0, 5)),  # a first frame that lasts shorter
        (frame_times(21, 300.0), (0, 21)),  # and the first of every five
        ((0, 1, 2, 3, 4, 30), (0, 5)),
        ((-30, 0, 1, 2, 3), (1, 5)),
        ((-30, -20, 0, 1, 2, 3, 4, 50), (2, 7)),
        ((0, 0, 1, 2, 3), (1, 5)),
        ((0, 1, 2, 3, 30, 31, 32), (0, 4)),
        ((0, 1, 2, 30, 31, 32), (3, 6)),
        ((0, 1, 2, 1, 2, 3, 4), (3, 7)),
        ((0, 1, 1, 1), (0, 2)),
        ((0, 1, 4, 5, 8, 9, 12), (0, 7)),  # in chunks of two
        ((0, 3, 4, 7, 8), (1, 5)),
        ((5,), (0, 1)),
        ((*frame_times(11, 0.0), *frame_times(6, 190 / 3)), (0, 0)),  # the second goes on where the first ends
    ],
    ids=str,
)
def test_frames_are_told_by_their_times(times, run):
    times = torch.tensor(times, dtype=torch.float64)
    assert longest_run(times) == run
    assert bool(go_on(times)) == (run == (0, len(times)))


def test_the_longest_run_is_that_of_a_slow_search():
    for seed in range(40):
        choose = random.Random(seed)
        times = [0.0]
        for _ in range(11):
            times.append(times[-1] + choose.choice([1, 1, 1, 1, 4, 4, 4, -2, 30]))
        times = torch.tensor(times)
        stretches = [(b - a, a, b) for a in range(12) for b in range(a + 1, 13) if bool(go_on(times[a:b]))]
        longest, start, stop = max(stretches)
        whole = [x for x in stretches if not any(y[1] <= x[1] and x[2] <= y[2] and x != y for y in stretches)]
        others = [(a, b) for n, a, b in whole if n >= 5 and n > longest / 2 and (a, b) != (start, stop)]
        assert longest_run(times) == ((0, 0) if any(a < stop and start < b for a, b in others) else (start, stop))


PACKINGS = {
    "text first": [("text", 9), ("audio", 6), ("video", 6, 4, 5)],
    "text last": [("video", 6, 4, 5), ("audio", 6), ("text", 9)],
    "between": [("text", 9), ("video", 6, 4, 5), ("audio", 7)],
    "a token on either side": [("text", 1), ("video", 5, 3, 4), ("text", 1)],
    "two videos": [("text", 5), ("video", 4, 4, 6), ("audio", 3), ("video", 6, 4, 5)],
    "two videos of one size": [("text", 5), ("video", 6, 4, 5), ("audio", 3), ("video", 6, 4, 5)],
    "next to each other": [("text", 5), ("video", 6, 5, 4), ("video", 7, 4, 5)],
    "the first is longer": [("text", 5), ("video", 9, 4, 5), ("audio", 3), ("video", 6, 4, 5)],
    "a reference": [("text", 9), ("picture", 6, 3), ("audio", 4), ("video", 6, 4, 5)],
    "a reference next to it": [("text", 9), ("picture", 4, 5), ("video", 6, 4, 5)],
    "keyframes": [("text", 9), ("picture", 4, 5, 9), ("picture", 4, 5, 40), ("audio", 4), ("video", 6, 4, 5)],
    "keyframes next to it": [("text", 9), ("picture", 4, 5, 9), ("picture", 4, 5, 40), ("video", 6, 4, 5)],
    "few frames": [("text", 4), ("audio", 3), ("video", 4, 4, 5)],
    "narrow": [("text", 4), ("audio", 3), ("video", 7, 9, 2)],
    "a reference video": [("text", 4), ("audio", 5), ("video", 5, 3, 4), ("audio", 8), ("video", 9, 5, 3)],
}
LAST = {"text last": 0, "between": 1, "a token on either side": 1, "the first is longer": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PACKINGS)
def test_the_longest_video_is_found_wherever_it_lies(name, kind):
    positions, _, starts = packed(PACKINGS[name])
    at = LAST.get(name, len(starts) - 1)
    table = tables(positions)[kind]
    found = find_video(table)
    assert (found.grid, found.start, found.tokens) == (PACKINGS[name][at][1:], starts[at], len(table))
    assert not found.doubt
    assert shows_video(table, *found[:4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pieces",
    [
        [("text", 60), ("audio", 30)],
        [("text", 9), ("audio", 4), ("picture", 6, 8)],
        [("text", 9), ("audio", 4), ("video", 2, 6, 8)],
        [("text", 9), ("picture", 6, 8), ("audio", 4), ("picture", 6, 8), ("audio", 4), ("picture", 6, 8)],
    ],
    ids=["none", "a picture", "two frames", "pictures apart"],
)
def test_where_no_video_is_none_is_found(pieces, kind):
    assert find_video(tables(packed(pieces)[0])[kind]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_another_order_are_no_video(kind):
    positions = packed([("text", 8), ("video", 6, 4, 6)])[0]
    frames = positions[8:].reshape(6, 4, 6, 3)
    shuffled = positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(1))]
    by_column = torch.cat([positions[:8], frames.transpose(1, 2).flatten(0, 2)])
    by_place = torch.cat([positions[:8], frames.permute(1, 2, 0, 3).flatten(0, 2)])
    tiles = torch.cat([positions[:8], frames.reshape(6, 2, 2, 2, 3, 3).permute(1, 3, 0, 2, 4, 5).reshape(-1, 3)])
    uneven = torch.cat([positions[:8], frames[:, :, :4].flatten(0, 2), frames[:, :, 4:].flatten(0, 2)])
    for other in (shuffled, by_column, by_place, tiles, uneven):
        assert find_video(tables(other)[kind]) is None


def test_other_tensors_are_no_positions():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(240, 48, generator=generator)
    for other in (noise, torch.zeros(240, 6), torch.eye(240), torch.ones(240, 5000)):
        assert find_video(other) is None


@pytest.mark.parametrize(
    ("times", "doubtful"),
    [
        ((0, 1, 2, 3), KINDS),
        ((10, 11, 12), KINDS),
        ((0, 1, 2, 3, 4), []),
        ((0, 1, 5, 9), ["numbers"]),
        ((0, 0.25, 1.25, 2.25), []),
        ((0, 0.25, 1.25), KINDS),
        ((0, 10, 20, 30, 40), ["numbers"]),  # further apart than rows
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_may_be_names_of_pictures_is_in_doubt(times, doubtful, kind):
    positions = torch.tensor([(-40.0, 0.0, 0.0)] * 7 + [(t, y, x) for t in times for y, x in places(6, 8)])
    table = tables(positions)[kind]
    found = find_video(table)
    assert (found.grid, found.doubt) == ((len(times), 6, 8), kind in doubtful)
    assert bool(shows_video(table, *found[:4])) != found.doubt


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_one_step_beside_the_frames_makes_all_of_them_pictures(kind):
    for times in ((20, 21, 22, 23, 24, 25, 19), (26, 20, 21, 22, 23, 24, 25)):
        positions = torch.tensor([(-40.0, 0.0, 0.0)] * 7 + [(t, y, x) for t in times for y, x in places(6, 8)])
        assert find_video(tables(positions)[kind]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_graph_checks_holds_for_its_own_packing_alone(kind):
    """All of these have 249 tokens."""
    several = {
        "own": [("text", 9), ("video", 5, 6, 8)],
        "text behind": [("video", 5, 6, 8), ("text", 9)],
        "moved by one": [("text", 8), ("video", 5, 6, 8), ("text", 1)],
        "another grid": [("text", 9), ("video", 6, 5, 8)],
        "pictures": [("text", 9), *[("picture", 6, 8, t) for t in (9, 11, 20, 21, 33)]],
        "no video": [("text", 249)],
    }
    own = find_video(tables(packed(several["own"])[0])[kind])
    shown = {name: bool(shows_video(tables(packed(p)[0])[kind], *own[:4])) for name, p in several.items()}
    assert shown == {name: name == "own" for name in several}


@pytest.mark.parametrize("kind", KINDS)
def test_a_book_gives_each_packing_its_own_plan(kind):
    several = [
        ([("text", 9), ("video", 5, 6, 8)], (5, 6, 8), (9, 0)),
        ([("text", 4), ("video", 5, 6, 8), ("text", 5)], (5, 6, 8), (4, 5)),
        ([("text", 9), ("video", 5, 8, 6)], (5, 8, 6), (9, 0)),
        ([("text", 249)], None, None),
        ([("text", 9), ("picture", 8, 6), ("video", 4, 6, 8)], (4, 6, 8), (57, 0)),
    ]
    book = Book(SPEC, 249, (0, 0), CPU, CPU)
    for pieces, grid, text in (*several, *several):
        found = book.plan(tables(packed(pieces)[0])[kind])
        wanted = dense_table(SPEC, 249) if grid is None else full_table(SPEC, grid, *text)
        for tensor, expected in zip(found, wanted, strict=True):
            assert torch.equal(tensor, expected)
    assert book.reads == 6  # the one without a video twice


def test_the_operator_adds_what_is_around_the_table():
    table = tables(packed([("text", 4), ("video", 5, 6, 8), ("text", 5)])[0])["sines"]
    arguments = (torch.empty(0), table, 0, 3, 259, SPEC.to_json())
    torch.library.opcheck(torch.ops.dynamicrad.plan_of_positions.default, arguments)
    for tensor, wanted in zip(plan_of_positions_op(*arguments), full_table(SPEC, (5, 6, 8), 7, 12), strict=True):
        assert torch.equal(tensor, wanted)
