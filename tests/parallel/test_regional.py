"""Blocks that are graphs of their own, in two processes: the sparse output of one process, where their grid is told."""

import json

import pytest

pytest.importorskip("diffusers")

from support.processes import output_of, start
from support.regional_worker import SCENARIOS


@pytest.mark.slow
def test_blocks_that_are_graphs_of_their_own(tmp_path):
    workers = start("support.regional_worker", 2, tmp_path / "meeting", list(SCENARIOS))
    found = json.loads(output_of(workers))
    for name in ("blocks", "ring"):
        check_blocks(found[name])
    check_graphs_that_break_at_hooks(found["hooks"])
    check_other_resolutions_compile_again(found["resolutions"])
    check_dense_and_right_where_rows_do_not_tell(found["two frames"])


def check_blocks(ranks):
    """Portrait and landscape share a graph and are sparse; three larger frames of as many tokens are dense in it."""
    for rank in ranks:
        first, turned, other = rank["steps"]
        assert first["sparse"] < 1e-5 < 1e-3 < first["dense"]
        assert turned["sparse"] < 1e-5 < 1e-3 < turned["dense"]
        assert other["dense"] < 1e-5 < 1e-3 < other["sparse"]
        assert first["graphs"] == turned["graphs"] == other["graphs"]
        assert rank["replaced"] == [True, True]
        assert any("5x6x8 and 5x8x6 run sparse" in note for note in rank["notes"])


def check_graphs_that_break_at_hooks(ranks):
    for rank in ranks:
        assert all(step["sparse"] < 1e-5 < 1e-3 < step["dense"] for step in rank["steps"])
        assert any("this process's rows" in note for note in rank["notes"])


def check_other_resolutions_compile_again(ranks):
    for rank in ranks:
        assert all(step["sparse"] < 1e-5 < 1e-3 < step["dense"] for step in rank["steps"])
        assert sorted(map(tuple, rank["grids"])) == [(5, 6, 8)] * 2 + [(6, 6, 8)] * 2 + [(7, 8, 6)] * 2


def check_dense_and_right_where_rows_do_not_tell(ranks):
    for rank in ranks:
        assert all(step["dense"] < 1e-5 < 1e-3 < step["sparse"] for step in rank["steps"])
        assert rank["replaced"] == [False, False]
        assert rank["reasons"] == ["shard_shows_no_grid"]
        assert all("set `grid`" in advice for advice in rank["advice"])
