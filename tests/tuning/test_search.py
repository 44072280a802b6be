"""Whole searches: the profile, the journal, resuming, processes and the command line."""

from __future__ import annotations

import json
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
from support.executors import Dying, Lost, Uneven, run_job_or_die
from support.tuning import GRID, SMALL, task

import dynamicrad_compile as drad
from dynamicrad_compile import cli
from dynamicrad_compile.errors import DynamicRadError
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.profiles import REGIMES, load_profile
from dynamicrad_compile.tuning import search
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.task import MODES


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A whole small search: (profile, folder)."""
    folder = tmp_path_factory.mktemp("tuned")
    match = {"heads": [2], "layers": 4}
    profile = drad.tune(GRID, folder / "small.toml", progress=False, match=match, header={"dense_layers": 1}, **SMALL)
    return profile, folder


def test_tune_writes_a_profile(tuned):
    profile, folder = tuned
    assert load_profile(folder / "small.toml") == profile
    assert profile.name == "small"
    assert profile.block_size == 16
    assert profile.dense_layers == 1
    assert profile.match.grid == list(GRID)
    provenance = profile.provenance
    assert provenance.budget == 10
    assert set(provenance.packages) >= {"nevergrad", "torch"}
    for regime in REGIMES:
        static, dynamic = (provenance.loss[f"{regime}_{mode}"] for mode in MODES)
        assert dynamic <= static + 1e-3
        assert provenance.sparsity[f"{regime}_static_ratio"] >= 0.8
        assert profile.regime(regime).dynamic_threshold is not None
    for name in ("small_convergence.png", "small_pareto.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    make_plan("dynamicrad", GRID, 16, profile=profile, regime="high")


def test_each_regime_wins_at_home(tuned):
    profile, _ = tuned
    for regime in REGIMES:
        objective = Objective(task(), regime)
        losses = {
            other: objective.evaluate("static_ratio", profile.regime(other).static_ratio.model_dump()).loss
            for other in REGIMES
        }
        assert losses[regime] <= min(losses.values()) + 1e-6


def test_budget_is_kept_and_every_evaluation_is_recorded(tuned):
    _, folder = tuned
    lines = [json.loads(line) for line in (folder / "small.jsonl").read_text().splitlines()]
    assert lines[0]["task"]["grid"] == list(GRID)
    for regime in REGIMES:
        for mode in MODES:
            of_search = [e for e in lines[1:] if (e["stage"], e["regime"], e["mode"]) == ("search", regime, mode)]
            assert sorted(entry["index"] for entry in of_search) == list(range(10))


def test_interrupted_search_resumes_to_the_same_profile(tuned, tmp_path, monkeypatch):
    profile, _ = tuned
    run_job, done = search.run_job, []

    def interrupted(job):
        if len(done) == 33:
            raise KeyboardInterrupt
        done.append(job)
        return run_job(job)

    settings = dict(progress=False, pictures=False, match={"heads": [2], "layers": 4}, header={"dense_layers": 1})
    monkeypatch.setattr(search, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drad.tune(GRID, tmp_path / "small.toml", **settings, **SMALL)
    assert len((tmp_path / "small.jsonl").read_text().splitlines()) == 1 + 33
    monkeypatch.setattr(search, "run_job", run_job)
    assert drad.tune(GRID, tmp_path / "small.toml", resume=True, **settings, **SMALL) == profile


ONE_MODE = {**SMALL, "modes": ("static_ratio",), "proxies": ("published",), "seeds": (1,)}
QUIET = dict(progress=False, pictures=False)


@pytest.fixture(scope="module")
def in_pairs(tmp_path_factory):
    """The profile of a search with two points at once, in our own processes."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.toml"
    return drad.tune(GRID, path, workers=2, **QUIET, **ONE_MODE)


def test_search_in_processes(in_pairs):
    assert in_pairs.regime("low").dynamic_threshold is None
    assert in_pairs.mode == "static_ratio"


def test_any_executor_gives_the_same_profile(in_pairs, tmp_path):
    """Whoever is slow: the optimizer is told in the order in which it asked."""
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        for number, executor in enumerate((threads, processes, Uneven(0), Uneven(1))):
            path = tmp_path / str(number) / "pairs.toml"
            assert drad.tune(GRID, path, workers=2, executor=executor, **QUIET, **ONE_MODE) == in_pairs


def test_a_worker_that_dies_loses_nothing(in_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "run_job", partial(run_job_or_die, str(tmp_path), 1))
    assert drad.tune(GRID, tmp_path / "pairs.toml", workers=2, **QUIET, **ONE_MODE) == in_pairs
    assert (tmp_path / "died0").exists()


def test_workers_that_always_die_end_a_search_that_can_be_gone_on_with(in_pairs, tmp_path):
    path = tmp_path / "pairs.toml"
    with ThreadPoolExecutor(2) as threads:
        with pytest.raises(
            DynamicRadError, match=r"evaluation 6 of low static_ratio \(search\).*resume=True \(--resume\)"
        ):
            drad.tune(GRID, path, workers=2, executor=Lost(threads, 6), **QUIET, **ONE_MODE)
        assert len(path.with_suffix(".jsonl").read_text().splitlines()) >= 1 + 6
        assert drad.tune(GRID, path, workers=2, executor=threads, resume=True, **QUIET, **ONE_MODE) == in_pairs


def test_search_by_dask(in_pairs, tmp_path):
    """The client itself; a worker kills itself, and the scheduler's word is that its job is lost."""
    distributed, dask = pytest.importorskip("distributed"), pytest.importorskip("dask")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = Dying(client, tmp_path)
        assert drad.tune(GRID, tmp_path / "pairs.toml", workers=2, executor=executor, **QUIET, **ONE_MODE) == in_pairs
        assert (tmp_path / "died0").exists()
        small = ["--grid", *map(str, GRID), "--block-size", "16", "--heads", "2", "--head-dim", "16", "--budget", "10"]
        small += ["--seeds", "1", "--rows", "40", "--modes", "static_ratio", "--proxies", "published", "--no-pictures"]
        file = tmp_path / "cli" / "pairs.toml"
        dask_there = ["--workers", "2", "--dask", cluster.scheduler_address]
        assert cli.main(["tune", *small, *dask_there, "-o", str(file)]) == 0
    assert load_profile(file) == in_pairs


def test_a_job_is_small_and_an_executor_is_checked_first(tmp_path):
    job = search.Job(task(), "search", "low", "static_ratio", 0, [0.5] * 8)
    assert len(pickle.dumps(job)) < 2000
    with pytest.raises(drad.OptionsError, match="executor must be an object with submit"):
        drad.tune(GRID, tmp_path / "new" / "x.toml", executor=4, **SMALL)
    assert not list(tmp_path.iterdir())


def test_command(capsys, tmp_path):
    output = tmp_path / "cli.toml"
    small = ["--grid", "5", "6", "7", "--block-size", "16", "--heads", "2", "--head-dim", "16", "--budget", "10"]
    small += ["--seeds", "1", "--rows", "20", "--modes", "static_ratio", "--fix", "compensate=0", "--fix", "box=2,2,4"]
    small.append("--no-pictures")
    assert cli.main(["tune", *small, "-o", str(output)]) == 0
    table = load_profile(output).regime("mid").static_ratio
    assert (table.compensate, table.box, table.covariance) == (0.0, (2, 2, 4), False)
    assert cli.main(["tune", *small, "-o", str(output)]) == 2
    assert "holds a journal already" in capsys.readouterr().err
    assert cli.main(["tune", *small, "-o", str(output), "--resume"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--fix", "compensate"], "--fix expects KEY=VALUE"),
        (["--fix", "compensate=5"], "compensate = 5:"),
        (["--boxes", "1,2,3", "raster", "--block-size", "16"], "boxes: box [1, 2, 3] holds 6 tokens"),
        (["--fix", "box=1,2,3", "--block-size", "16"], "box [1, 2, 3] holds 6 tokens"),
        (["--optimizer", "CMAA"], "Did you mean 'CMA'"),
        (["--block-size", "17"], "block_size must be one of [16, 32,"),
        (["--seed", "-1"], "seed must be an integer of at least 0"),
        (["--workers", "0"], "workers must be an integer of at least 1"),
        (["--dask", "nonsense"], "--dask: no scheduler at nonsense"),
        (["--captures", "none.safetensors"], "can't be read"),
        (["-o", "{tmp}/file/x.toml"], "is a file, not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_leaves_nothing_that_blocks_the_corrected_command(capsys, tmp_path, wrong, message):
    (tmp_path / "file").write_text("")
    command = ["tune", "--grid", "3", "4", "5", "--budget", "10", "-o", str(tmp_path / "x.toml")]
    assert cli.main([*command, *(text.format(tmp=tmp_path) for text in wrong)]) == 2
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_without_dask_the_command_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.main(["tune", "--grid", "3", "4", "5", "--dask", "tcp://x:1", "-o", str(tmp_path / "x.toml")]) == 2
    assert "--dask needs distributed: pip install 'distributed>=2024.5'" in capsys.readouterr().err


def test_a_target_that_no_plan_reaches_is_said(capsys, tmp_path):
    """60 tokens are one block of 128: nothing can be skipped."""
    settings = {**SMALL, "block_size": 128, "proxies": ("published",), "modes": ("static_ratio",)}
    profile = drad.tune((3, 4, 5), tmp_path / "x.toml", pictures=False, **settings)
    said = "target sparsity 0.8 not reached: low static_ratio 0.0000, mid"
    assert said in capsys.readouterr().err
    assert said in profile.provenance.source


def test_a_header_that_no_profile_has_is_told_before_the_search(tmp_path):
    with pytest.raises(drad.ProfileError, match="dense_layers = -1"):
        drad.tune(GRID, tmp_path / "x.toml", header={"dense_layers": -1}, progress=False, **SMALL)
    assert not list(tmp_path.iterdir())
