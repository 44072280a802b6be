"""Whole searches: the profile, the journal, resuming, processes and the command line."""

from __future__ import annotations

import json

import pytest
from support.tuning import GRID, SMALL, task

import dynamicrad_compile as drad
from dynamicrad_compile import cli
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


def test_search_in_processes(tmp_path):
    settings = {**SMALL, "modes": ("static_ratio",), "proxies": ("published",), "seeds": (1,)}
    profile = drad.tune(GRID, tmp_path / "two.toml", workers=2, progress=False, pictures=False, **settings)
    assert profile.regime("low").dynamic_threshold is None
    assert profile.mode == "static_ratio"


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
