"""Sparse attention under diffusers' context parallelism, in several processes: that of one process."""

import json

import pytest

pytest.importorskip("diffusers")

from support.parallel_worker import SCENARIOS
from support.processes import output_of, start

OFTEN = ["ulysses wan22_ti2v", "ring ragged"]


def run(world, tmp_path, names=None):
    """Results of all ranks by name: one start of the processes for all scenarios."""
    workers = start("support.parallel_worker", world, tmp_path / "meeting", names or list(SCENARIOS[world]))
    return json.loads(output_of(workers))


def check(name, results):
    """What holds on every rank: the output of one process, sparse, the dense program's bytes, no graph twice."""
    for rank in results:
        assert rank["error"] < 1e-5 < 1e-3 < rank["to_dense"], (name, rank)
        assert rank["replaced"] == 2, (name, rank)
        assert "context_parallel" not in rank["reasons"], name
        assert rank["sent"][0] == rank["sent"][1] > 0, name
        assert len(set(rank["graphs"])) == 1, name
        assert not any("__closure__" in path for path in rank["paths"]), name
    assert len({str(rank["grids"]) for rank in results}) == 1, name


@pytest.mark.slow
def test_two_processes(tmp_path):
    found = run(2, tmp_path, [name for name in SCENARIOS[2] if name not in OFTEN])
    for rank in found.pop("ring stays dense"):  # its attentions are as they were
        assert rank["error"] < 1e-5
        assert (rank["replaced"], rank["reasons"]) == (0, ["few_tokens", "other_tokens"])
        assert rank["sent"][0] == rank["sent"][1] > 0
    for name, results in found.items():
        check(name, results)


@pytest.mark.slow
def test_four_processes(tmp_path):
    for name, results in run(4, tmp_path).items():
        check(name, results)


def test_one_of_each(tmp_path):
    """The two that most people run, of the many that are slow."""
    for name, results in run(2, tmp_path, OFTEN).items():
        check(name, results)


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_on_the_others(tmp_path):
    result = json.loads(output_of(start("support.dying_worker", 2, tmp_path / "meeting"), timeout=300))
    assert result["replaced"] == 2
    assert result["raised"]
