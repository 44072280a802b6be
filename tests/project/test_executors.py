"""Jobs by any executor: all results, whoever is slow, and what happens where a worker dies or a job fails."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
from support.executors import Dying, Reversed, die_first, double, fail_at_three, worker

from dynamicrad_compile.errors import DynamicRadError, OptionsError
from dynamicrad_compile.executors import Workers

NUMBERS = [1, 2, 3, 4]


def spawned(workers=2):
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def run(function, executor=None, processes=1, jobs=NUMBERS, **more):
    workers = Workers(executor, processes, goes_on="doing it again", **more)
    try:
        return list(workers.run(function, jobs, lambda job: f"job {job}"))
    finally:
        workers.close()


@pytest.mark.parametrize("wrong", [3, "threads", ThreadPoolExecutor], ids=str)
def test_no_executor(wrong):
    with pytest.raises(OptionsError, match=r"executor must be an object with submit\(function, \*arguments\)"):
        Workers(wrong, goes_on="")


def test_all_results_with_their_places():
    wanted = [(0, 2), (1, 4), (2, 6), (3, 8)]
    assert run(double) == wanted
    with ThreadPoolExecutor(2) as threads, spawned() as processes:
        for executor in (threads, processes):
            assert sorted(run(double, executor)) == wanted
    assert run(double, Reversed(4)) == wanted[::-1]
    assert sorted(run(double, processes=2)) == wanted
    assert run(double, Reversed(1), jobs=[]) == []


def test_what_a_job_raises_is_raised_once_when_the_others_are_done(caplog):
    results = Workers(executor := Reversed(4), goes_on="").run(fail_at_three, NUMBERS, str)
    assert [next(results) for _ in range(3)] == [(3, 4), (1, 2), (0, 1)]
    with pytest.raises(ValueError, match="three is refused") as caught:
        next(results)
    assert executor.jobs == NUMBERS  # none a second time
    assert "in fail_at_three" in str(caught.value.__cause__)  # the worker's traceback
    assert "3 failed, 2 others are waited for: ValueError: three is refused" in caplog.text
    with pytest.raises(ValueError, match="three is refused"):
        run(fail_at_three, processes=2)
    with pytest.raises(ValueError, match="three is refused"):
        run(fail_at_three)


def test_who_stops_asking_cancels_what_is_left():
    executor = Reversed(3)  # the fourth call is never done
    results = Workers(executor, goes_on="").run(double, NUMBERS, str)
    assert next(results) == (2, 6)
    results.close()
    ((last, *_),) = executor.calls
    assert last.cancelled()


def test_own_processes_are_replaced_where_one_dies(tmp_path, caplog):
    said = []
    with caplog.at_level(logging.WARNING, "dynamicrad_compile.executors"):
        found = run(partial(die_first, str(tmp_path), 1, double), processes=2, say=said.append)
    assert sorted(found) == [(0, 2), (1, 4), (2, 6), (3, 8)]
    assert "its worker was lost, try 1 of 3: BrokenProcessPool" in caplog.text
    assert said[0].endswith("again, its worker was lost")


def test_a_job_that_kills_every_worker_ends_the_run(tmp_path):
    with pytest.raises(
        DynamicRadError, match=r"job 5: no worker came back with it in 3 tries.*go on by doing it again"
    ):
        run(partial(die_first, str(tmp_path), 9, double), processes=2, jobs=[5])
    assert len(list(tmp_path.iterdir())) == 3
    with spawned() as processes, pytest.raises(DynamicRadError, match="in 3 tries"):
        run(double, Dying(processes, tmp_path, 9))  # whose owner would have to replace it


@pytest.fixture(scope="module")
def client():
    """A client of a scheduler with two worker processes, that gives a task up when its worker has died once."""
    distributed = pytest.importorskip("distributed")
    dask = pytest.importorskip("dask")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_dask(client, tmp_path):
    for executor in (client, client.get_executor()):
        assert sorted(run(double, executor)) == [(0, 2), (1, 4), (2, 6), (3, 8)]
        with pytest.raises(ValueError, match="three is refused"):
            run(fail_at_three, executor)
    ((_, where),) = run(lambda _: worker(), client, jobs=[0])
    assert where != os.getpid()


def test_dask_workers_that_die(client, tmp_path, caplog):
    assert sorted(run(double, Dying(client, tmp_path))) == [(0, 2), (1, 4), (2, 6), (3, 8)]
    assert "KilledWorker" in caplog.text
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(DynamicRadError, match=r"job 1: no worker came back.*KilledWorker"):
        run(double, Dying(client.get_executor(), other, 3), jobs=[1])
