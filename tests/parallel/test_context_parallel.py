"""Sparse attention under diffusers' context parallelism, in several processes: that of one process."""

import json

import pytest

pytest.importorskip("diffusers")

from support.parallel_worker import FOUR, SCENARIOS, TWO
from support.processes import output_of, start


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of all scenarios for so many processes, which are started once."""
    known = {}

    def results(world, names=None):
        if world not in known:
            meeting = tmp_path_factory.mktemp("group") / "meeting"
            workers = start("support.parallel_worker", world, meeting, names or list(SCENARIOS[world]))
            known[world] = json.loads(output_of(workers))
        return known[world]

    return results


def check(results):
    """What holds on every rank: the output of one process, sparse, the dense program's bytes, no graph twice."""
    for rank in results:
        assert rank["error"] < 1e-5, rank
        assert rank["to_dense"] > 1e-3, rank
        assert rank["replaced"] == 2, rank
        assert "context_parallel" not in rank["reasons"]
        assert rank["sent"][0] == rank["sent"][1] > 0
        assert len(set(rank["graphs"])) == 1
        assert not any("__closure__" in path for path in rank["paths"])
    assert len({str(rank["grids"]) for rank in results}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TWO if name != "ring stays dense"])
def test_two_processes(found, name):
    check(found(2)[name])


@pytest.mark.slow
def test_a_ring_that_stays_dense_is_left_as_it_was(found):
    for rank in found(2)["ring stays dense"]:
        assert rank["error"] < 1e-5
        assert (rank["replaced"], rank["reasons"]) == (0, ["few_tokens", "other_tokens"])
        assert rank["sent"][0] == rank["sent"][1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(found, name):
    check(found(4)[name])


def test_one_of_each(tmp_path):
    """The two that most people run, of the many that are slow."""
    names = ["ulysses wan22_ti2v", "ring ragged"]
    results = json.loads(output_of(start("support.parallel_worker", 2, tmp_path / "meeting", names)))
    for name in names:
        check(results[name])


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_on_the_others(tmp_path):
    result = json.loads(output_of(start("support.dying_worker", 2, tmp_path / "meeting"), timeout=300))
    assert result["replaced"] == 2
    assert result["raised"]
