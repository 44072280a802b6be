"""Clips made by the workers of an executor are those of one process, and are kept as they come."""

from __future__ import annotations

import pickle
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from support.executors import Dying
from support.plain import PLAIN
from support.subject import tiny

from dynamicrad_compile import cli, quality
from dynamicrad_compile.errors import DynamicRadError, OptionsError
from dynamicrad_compile.quality import making

TINY = "support.subject:tiny"


def evaluate(folder, executor=None, subject=None, methods=quality.METHODS):
    """Three clips in batches of two by all methods, in one process or by an executor."""
    subject = subject or quality.load_subject(TINY)
    chosen = [quality.method(name, subject, 0.5, 16, profile=PLAIN) for name in methods]
    settings = dict(seeds=3, batch=2, real=6, progress=False)
    return quality.evaluate(subject, chosen, ["a"], folder, executor=executor, **settings)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """(results, folder) of one process."""
    folder = tmp_path_factory.mktemp("here")
    return evaluate(folder), folder


def assert_equal(results, folder, here):
    """All numbers of the methods that were made but the seconds, and all their clips."""
    wanted, there = here
    rows = {row["method"]: row for row in wanted.to_json()["rows"]}
    for mine in results.to_json()["rows"]:
        for name, value in rows[mine["method"]].items():
            if name != "seconds":
                assert mine[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    files = list((folder / "clips").iterdir())
    assert len(files) == len([row for row in results.rows if row.method != "real"])
    for file in files:
        mine, other = load_file(file), load_file(there / "clips" / file.name)
        assert torch.equal(mine["clips"], other["clips"]), file.name
        assert torch.equal(mine["sparsity"], other["sparsity"]), file.name


def test_threads_make_the_same_clips(here, tmp_path):
    with ThreadPoolExecutor(2) as threads:
        assert_equal(evaluate(tmp_path, threads), tmp_path, here)


def test_dask_workers_make_the_same_clips_and_one_that_dies_loses_nothing(here, tmp_path, capsys):
    distributed, dask = pytest.importorskip("distributed"), pytest.importorskip("dask")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        folder, executor = tmp_path / "dask", Dying(client, tmp_path)
        assert_equal(evaluate(folder, executor, methods=["static_ratio", "oracle"]), folder, here)
        assert (tmp_path / "died0").exists()
        there = ["--subject", TINY, "--block-size", "16", "--prompt", "a", "--real", "0", "--sparsity", "0.5"]
        there += ["--methods", "random", "--dask", cluster.scheduler_address]
        assert cli.main(["eval", *there, "-o", str(tmp_path / "cli")]) == 0
    assert "random" in capsys.readouterr().out
    assert len(list((tmp_path / "cli" / "clips").iterdir())) == 2


class Gone(ThreadPoolExecutor):
    """Does three jobs, then its workers are gone."""

    given = 0

    def submit(self, *call):
        self.given += 1
        if self.given > 3:
            raise BrokenExecutor("all workers are gone")
        return super().submit(*call)


def test_what_was_made_before_the_workers_were_gone_is_kept(here, tmp_path, monkeypatch):
    with Gone(1) as executor, pytest.raises(DynamicRadError, match=r"in 3 tries.*go on by the same evaluation"):
        evaluate(tmp_path, executor)
    assert len(list((tmp_path / "clips").iterdir())) == 3  # given before they were gone, and waited for
    made, generate = [], making._generate
    monkeypatch.setattr(making, "_generate", lambda *call: made.append(call) or generate(*call))
    assert_equal(evaluate(tmp_path), tmp_path, here)
    assert len(made) == len(quality.METHODS) - 3


def test_methods_can_be_sent():
    subject = tiny()
    for name in quality.METHODS:
        item = quality.method(name, subject, 0.5, 16, profile=PLAIN)
        assert pickle.loads(pickle.dumps(item)).describe() == item.describe()


def test_what_workers_can_not_do_is_told_first(tmp_path):
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(DynamicRadError, match=r"'tiny' does not say how. Make it by quality\.load_subject"):
            evaluate(tmp_path / "none", threads, tiny())
        with pytest.raises(OptionsError, match="executor must be an object with submit"):
            evaluate(tmp_path / "none", 4)
        assert not list(tmp_path.iterdir())
        other = tiny(name="other")
        other.source = (TINY, {})
        with pytest.raises(DynamicRadError, match=r"loaded the subject 'tiny' by support\.subject:tiny, not 'other'"):
            evaluate(tmp_path, threads, other)


def test_a_subject_is_kept_for_the_next_job():
    subject = quality.load_subject(TINY, seed=1)
    assert subject.source == (TINY, {"seed": 1})
    job = making.Job(subject.source, "tiny", quality.Dense(), ["a"], [0], 1)
    first = making.run_job(job)["clips"]
    loaded = making._loaded[1]
    assert torch.equal(making.run_job(job)["clips"], first)
    assert making._loaded[1] is loaded
    making.run_job(making.Job((TINY, {}), "tiny", quality.Dense(), ["a"], [0], 1))
    assert making._loaded[1] is not loaded
