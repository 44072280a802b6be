"""The day's script: rows in processes of their own, what bars a row, and a dry run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_day
import pytest
from suite import bars, day, day_table
from suite.apart import Batch, run_apart
from suite.runner import Journal, Row
from support import day_rows

ABOUT = {"chip": "AMD EPYC", "device": "cpu", "arch": "cpu"}


def run(folder: Path, *groups: str, **options):
    """The journal's rows after groups of rows ("first die second"), and how often the journal was written."""
    rows = {row.name: row for row in day_rows.make(folder, {"rows": []})}
    made = [[rows[name.replace("_", " ")] for name in group.split()] for group in groups]
    journal = Journal(folder / "run.json", {"rows": []})
    far = time.monotonic() + 1000
    options = {"deadline": far, "end": far, "limit": 100.0, **options}
    run_apart(Batch(made, day_rows.make, folder, **options), journal)
    assert json.loads((folder / "run.json").read_text()) == journal.content
    return {row["name"]: row for row in journal.rows}


def test_a_group_shares_a_process(tmp_path):
    rows = run(tmp_path, "first unsupported second", "third")
    assert {name: row["status"] for name, row in rows.items()} == {
        "first": "ok", "unsupported": "unsupported", "second": "ok", "third": "ok"}  # fmt: skip
    first, second, third = ((tmp_path / name).read_text() for name in ("first", "second", "third"))
    assert first == second != third
    assert rows["second"]["before"] == ["first", "unsupported"]
    assert rows["unsupported"]["why"] == "not on this chip"


def test_a_crash_costs_one_row(tmp_path):
    rows = run(tmp_path, "first die second", "third", jobs=2)
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"first", "second", "third"}
    assert rows["die"]["why"].startswith("the process ended while it ran: signal SIGABRT")
    assert rows["die"]["lost_its_process"]
    assert "an assertion of the compiler" in (tmp_path / "run.log").read_text()


def test_a_hang_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("suite.apart.GRACE", 0.2)
    rows = run(tmp_path, "hang second", limit=2.0)
    assert rows["hang"]["why"] == "took longer than 2 s and was killed"
    assert rows["second"]["status"] == "ok"


def test_the_end_of_the_run_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("suite.apart.GRACE", 0.2)
    rows = run(tmp_path, "hang", end=time.monotonic() + 2)
    assert (rows["hang"]["status"], rows["hang"]["why"]) == ("skipped", "the run had to end while it ran")


def test_two_lost_processes_end_a_group(tmp_path):
    rows = run(tmp_path, "die die_again first")
    assert [rows[name]["status"] for name in ("die", "die again", "first")] == ["failed"] * 3
    assert rows["first"]["why"].startswith("not tried after 2 lost processes")
    assert not (tmp_path / "first").exists()


def test_rows_that_are_barred_or_late_do_not_run(tmp_path):
    rows = run(tmp_path, "first second", bar=lambda row: "its check failed" if row.name == "first" else None)
    assert (rows["first"]["status"], rows["first"]["why"]) == ("unsupported", "its check failed")
    assert rows["second"]["status"] == "ok"
    late = run(tmp_path, "third", deadline=time.monotonic())
    assert late["third"]["status"] == "skipped"
    assert not (tmp_path / "first").exists()
    assert not (tmp_path / "third").exists()


TILE = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3, "kernel": "gluon", "head_dim": 128}


def record(group: str, status: str, **facts):
    return {"name": f"{group}/x", "group": group, "status": status, "why": "wrong", **TILE, **facts}


def check(status: str, **facts):
    return record("correctness", status, **{"kernel": "forward gluon", "dtype": "bfloat16", **facts})


@pytest.mark.parametrize(
    ("before", "barred"),
    [
        ([], False),
        ([record("builds", "ok"), record("tries", "ok"), check("ok")], False),
        ([record("builds", "failed")], True),
        ([record("builds", "skipped")], False),
        ([record("builds", "failed", block_n=128)], False),
        ([record("tries", "failed")], True),
        ([record("tries", "skipped")], False),
        ([check("failed")], True),
        ([check("failed", head_dim=64)], False),
        ([check("failed", head_dim=64, lost_its_process=True)], True),
        ([check("failed", dtype="float32")], False),
        ([check("failed", kernel="forward tma")], False),
        ([check("unsupported")], False),
    ],
)
def test_what_bars_a_tile(before, barred: bool):
    row = Row("tile/x", "tiles", dict, facts=TILE)
    why = bars.bar(row, {"rows": before}, 128)
    assert (why is not None) == barred
    assert why is None or "wrong" in why


def test_what_bars_other_rows():
    row = Row("step/x", "steps", dict, facts={})
    wrong = [check("failed", kernel="forward triton")]
    assert "failed: wrong" in bars.bar(row, {"rows": wrong}, 128)
    assert bars.bar(row, {"rows": wrong}, 64) is None
    other = {"rows": wrong, "tile_proposal": [{"head_dim": 128, "kernel": "tma"}]}
    assert bars.bar(row, other, 128) is None  # the op takes the form that won
    dense = Row("dense/x", "dense", dict, facts={"head_dim": 128})
    assert bars.bar(dense, {"rows": wrong}, 128) is None
    backward = Row("backward/x", "backward", dict, facts={"head_dim": 128, "kernel": "tma"})
    assert bars.bar(backward, {"rows": [check("failed", kernel="backward tma")]}, 128)
    assert bars.bar(backward, {"rows": [check("failed", kernel="backward triton")]}, 128) is None
    case = Row("correct/x", "correctness", dict, facts={"kernel": "forward gluon", "dtype": "float16"})
    assert bars.bar(case, {"rows": [check("failed")]}, 128) is None
    assert "wrong" in bars.bar(case, {"rows": [check("failed", lost_its_process=True)]}, 128)
    assert "no tile of it was built" in bars.bar(case, {"rows": [record("builds", "failed")]}, 128)


def test_stages_leave_room_for_their_rows():
    about = day.Day("cuda", False, True, "bf16", 90, 0.8, 2)
    names = set()
    for stage in day.STAGES:
        rows = [row for group in day.groups_of(stage, about, {"about": ABOUT, "rows": []}) for row in group]
        names |= {row.name for row in rows}
        assert stage.share == 0 or max(row.seconds for row in rows) <= stage.share
    assert {"forward/32760/128/0.8", "flex/32760/64/0.8", "tile/32760/128/gluon_pingpong/128x128/8/2"} <= names
    assert {"build/90/64/gluon/128x128/8/3", "correct/backward_tma/even", "step/69120/static"} <= names


def test_the_table_is_short():
    rows = [check("failed", name=f"correct/{i}") for i in range(100)]
    rows += [record("tiles", "ok", ms=2.0, tflops=500.0), record("tiles", "failed", block_n=128)]
    rows += [
        {"name": "forward/32760/128/0.8", "group": "forward", "status": "ok", "ms": 2.0, "tflops": 500.0, "gain": 3.5}
    ]
    rows += [{"name": f"forward/{i}", "group": "forward", "status": "ok", "ms": 2.0} for i in range(100)]
    text = day_table.short({"about": ABOUT, "rows": rows, "reduced": False}, 32760, 69120, (128,), 0.8)
    lines = text.splitlines()
    assert sum("FAILED" in line for line in lines) == day_table.FAILURES
    assert len(lines) == day_table.LINES
    assert max(map(len, lines)) <= day_table.COLUMNS
    assert "met" in next(line for line in lines if "TFLOP/s on active blocks" in line)
    assert "MISSED" in next(line for line in lines if "over the best dense" in line)
    assert any("gluon" in line and "1 of 2 tiles timed" in line for line in lines)


def dry_run(tmp_path, *arguments):
    where = ("--device", "cpu", "--reduced", "--output", str(tmp_path), "--name", "day", "--budget", "3000")
    content = gpu_day.main([*where, *arguments])
    return content, {row["name"]: row for row in content["rows"]}


def test_a_check_that_fails_bars_the_timing(tmp_path, capsys):
    only = ("--only", "correct/forward_triton/head_dim", "try", "tile", "forward")
    saved = Journal(tmp_path / "old.json", {"schema": 1, "name": "day", "command": "", "rows": [], "reduced": True})
    saved.content["about"] = gpu_day.start(gpu_day.parse(["--device", "cpu", "--reduced"])).content["about"]
    saved.add(check("failed", head_dim=64, kernel="forward triton"))
    _, rows = dry_run(tmp_path, *only, "--resume", str(saved.path))
    timed = {name: row["status"] for name, row in rows.items() if name.startswith("tile/512/64/t")}
    assert {status for name, status in timed.items() if "/tma/" in name} == {"ok"}
    assert {status for name, status in timed.items() if "/triton/" in name} == {"unsupported"}
    assert rows["forward/512/64/0.8"]["status"] == "ok"  # by the form that won
    assert "correctness/x failed: wrong" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_day_reduced(tmp_path, capsys):
    content, rows = dry_run(tmp_path)
    status = {name: (row["status"], row.get("why")) for name, row in rows.items() if row["status"] != "ok"}
    assert all(name.startswith(("flex/", "gather/")) for name in status), status
    assert {row["group"] for row in rows.values()} == {
        *("machine", "builds", "correctness", "tries", "tiles", "dense", "forward", "flex", "overhead", "steps"),
        *("backward", "graphs"),
    }
    assert content == json.loads((tmp_path / "day.json").read_text())
    assert content["tile_proposal"]
    page = (tmp_path / "day.md").read_text()
    assert all(f"## {title}" in page for title in ("Correctness", "Builds", "Tiles", "Whole block and step"))
    assert str(Path.home()) not in page
    assert "goals, 512 tokens" in capsys.readouterr().out


def test_missing_packages_are_named_at_once(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    script = Path(gpu_day.__file__).with_suffix(".sh")
    environment = {**os.environ, "PYTHON": str(bare), "PYTHONPATH": ""}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "lacks torch, triton, numpy, pydantic," in done.stderr
    assert "which wheels to bring" in done.stderr


def test_wrong_arguments(monkeypatch, capsys):
    for arguments, why in (
        (["--device", "cpu"], "--reduced, or --only build"),
        (["--device", "cpu", "--reduced", "--resume", "nowhere.json"], "there is no such file"),
    ):
        with pytest.raises(SystemExit):
            gpu_day.parse(arguments)
        assert why in capsys.readouterr().err
    monkeypatch.setenv("DYNAMICRAD_KERNEL", "tma")
    with pytest.raises(SystemExit):
        gpu_day.parse(["--device", "cpu", "--reduced"])
    assert "unset it" in capsys.readouterr().err
