"""The whole-step benchmark at a tiny size: the plumbing, not the figures."""

from __future__ import annotations

import json
from pathlib import Path

import cpu_step
import pytest
import torch


def test_quick_run_writes_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_step, "RESULTS", tmp_path)
    (row,) = cpu_step.main(["--quick", "--save", "tiny"])
    assert row.tokens == 240
    assert 0 < row.sparsity < 1
    assert row.step_gain == pytest.approx(row.step_dense_s / row.step_sparse_s)
    saved = json.loads((tmp_path / "tiny.json").read_text())
    assert saved["rows"][0]["tokens"] == 240
    assert saved["machine"]["torch"]
    page = (tmp_path / "tiny.md").read_text()
    assert str(Path.home()) not in page
    assert cpu_step.table([row]) in page
    assert cpu_step.table([row]) in capsys.readouterr().out


# 4 S d for attention against 12 d^2 + 4 d ffn for projections and feed-forward, per token and layer.
@pytest.mark.parametrize(("size", "share"), [("8k", 0.38), ("32k", 0.71)])
def test_attention_share_of_a_wan_layer(size, share):
    assert cpu_step.attention_share(1536, 4, cpu_step.GRIDS[size]) == pytest.approx(share, abs=0.02)


@pytest.fixture
def suite(monkeypatch):
    """Modules of the GPU suite."""
    import gpu_suite

    return gpu_suite


def run_suite(gpu_suite, tmp_path, *arguments):
    patient = ("--budget", "3000", "--row-limit", "1000")  # a busy machine is no failure
    where = ("--device", "cpu", "--reduced", "--output", str(tmp_path), "--name", "run")
    content = gpu_suite.main([*where, *patient, *arguments])
    return content, {row["name"]: row for row in content["rows"]}


@pytest.mark.slow
def test_suite_runs_reduced(suite, tmp_path, capsys):
    content, rows = run_suite(suite, tmp_path)
    status = {name: (row["status"], row.get("why")) for name, row in rows.items() if row["status"] != "ok"}
    assert all(name.startswith(("flex/", "gather/")) for name in status), status
    assert {row["group"] for row in rows.values()} == {
        *("correctness", "dense", "forward", "flex", "backward", "graphs", "overhead", "steps")
    }
    assert all(row["bound"] in row["terms_ms"] for row in rows.values() if row["group"] == "forward")
    assert content == json.loads((tmp_path / "run.json").read_text())
    page = (tmp_path / "run.md").read_text()
    assert all(f"## {title}" in page for title in ("Correctness", "Forward", "Roofline", "Whole block and step"))
    assert "Its figures say nothing about speed" in page
    assert str(tmp_path) not in page
    assert str(Path.home()) not in page
    assert "18 of 18 checks passed" in capsys.readouterr().out


def test_suite_keeps_going_and_resumes(suite, tmp_path, monkeypatch):
    def broken(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(suite.attention, "run_dense", broken)
    only = ("--only", "correct/merge", "dense/512", "forward/512")
    _, rows = run_suite(suite, tmp_path, "--budget", "0.3", *only)
    assert {row["status"] for row in rows.values()} <= {"ok", "failed", "skipped"}
    _, rows = run_suite(suite, tmp_path, *only)
    assert rows["dense/512/32"]["why"] == "out of memory: no room"
    assert [rows[f"forward/512/32/{s}"]["status"] for s in ("0", "0.8")] == ["ok", "ok"]
    assert rows["forward/512/32/0.8"]["gain"] is None
    page = (tmp_path / "run.md").read_text()
    assert "failed dense/512/32: out of memory: no room" in page

    # A run that was cut off: its unfinished row counts as failed, skipped ones are tried, the others are kept.
    saved = json.loads((tmp_path / "run.json").read_text())
    saved["rows"][-1] |= {"status": "skipped", "why": "0 s were left"}
    kept = saved["rows"][0] | {"marked": True}
    saved["rows"][0] = kept
    (tmp_path / "run.json").write_text(json.dumps(saved))
    _, rows = run_suite(suite, tmp_path, *only, "--resume", str(tmp_path / "run.json"))
    assert rows[kept["name"]]["marked"]
    assert rows[saved["rows"][-1]["name"]]["status"] == "ok"
    saved["about"]["chip"] = "another"
    (tmp_path / "run.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit, match="that run had chip another"):
        run_suite(suite, tmp_path, "--resume", str(tmp_path / "run.json"))
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(SystemExit, match="is no result of this suite"):
        run_suite(suite, tmp_path, "--resume", str(tmp_path / "run.json"))


def test_suite_sees_a_wrong_kernel(suite, tmp_path, monkeypatch):
    right = cpu_step.drad.block_sparse_attention

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return (out[0] * 1.02, out[1]) if isinstance(out, tuple) else out * 1.02

    monkeypatch.setattr(cpu_step.drad, "block_sparse_attention", wrong)
    _, rows = run_suite(suite, tmp_path, "--only", "correct/forward/even", "forward/512/32/0.8")
    assert {row["status"] for row in rows.values()} == {"failed"}
    assert "is above" in rows["correct/forward/even"]["why"]


def test_suite_feeds_the_crossover_table(suite, tmp_path):
    import crossover as script

    run_suite(suite, tmp_path, "--only", "dense", "forward")
    target = tmp_path / "table.toml"
    estimates = script.main(["estimate", "--write", "--output", str(target)])
    (measured,) = script.main(["suite", str(tmp_path / "run.json"), "--write", "--output", str(target)])
    assert (measured.arch, measured.dtype, measured.source) == ("cpu", "float", "measured")
    assert {row.tokens for row in measured.rows} == {512, 1012}
    from dynamicrad_compile.plans import crossover

    assert len(crossover.load(target)) == len(estimates) + 1
    again = [script.crossover.Table(**{**dict(measured), "source": "estimated"})]
    assert [t.source for t in script.merged([measured], again)] == ["measured"]


def test_crossover_measures_this_machine(tmp_path, monkeypatch):
    import crossover as script

    (table,) = script.main(
        ["measure", "--tokens", "512", "--head-dims", "64", "--heads", "1", "--dtypes", "float", "--rounds", "1"]
    )
    assert table.rows
    assert all(row.ratio > 0 for row in table.rows)
    assert len({row.sparsity for row in table.rows}) == len(table.rows)


def test_tile_proposal():
    from suite import tile_rows

    def row(tokens, m, kernel, ms, current):
        sizes = {"block_m": m, "block_n": 64, "num_warps": 8, "num_stages": 3, "kernel": kernel}
        shape = {"group": "tiles", "status": "ok", "dtype": "bfloat16", "head_dim": 128, "tokens": tokens}
        return {**sizes, **shape, "ms": ms, "is_current": current}

    # 64 wins at one length, 128 with the copy engine over both; 256 failed at one of them.
    rows = [row(1, 64, "triton", 1.0, True), row(1, 128, "tma", 1.1, False), row(1, 256, "triton", 0.9, False)]
    rows += [row(2, 64, "triton", 2.0, True), row(2, 128, "tma", 1.0, False)]
    (found,) = tile_rows.proposal(rows)
    assert (found["tile"], found["kernel"]) == ([128, 64, 8, 3], "tma")
    assert found["current_score"] == pytest.approx((1 / 0.9 + 2.0) / 2)


def test_backward_proposal():
    from suite import tile_rows

    facts = {"group": "backward", "dtype": "bfloat16", "head_dim": 128, "status": "ok"}
    rows = [{**facts, "kernel": "triton", "ms": 3.0}, {**facts, "kernel": "tma", "ms": 2.0}, {**facts, "ms": 1.0}]
    (found,) = tile_rows.backward_proposal(rows)
    assert (found["kernel"], found["gain"]) == ("tma", 1.5)
    assert tile_rows.backward_proposal(rows[1:]) == []
