"""The journal survives a crash and refuses those of other tasks."""

from __future__ import annotations

import pytest
from support.tuning import task

from dynamicrad_compile.errors import OptionsError
from dynamicrad_compile.tuning.journal import VERSION, Journal
from dynamicrad_compile.tuning.objective import Evaluation, Objective
from dynamicrad_compile.tuning.space import DEFAULTS


def test_journal_survives_a_crash_and_refuses_others(tmp_path):
    path = tmp_path / "a.jsonl"
    journal = Journal(path, task(), {}, resume=False)
    objective = Objective(task(), "low")
    ok = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8})
    pruned = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8, "decay_factor": 1e9})
    journal.write("search", "low", "static_ratio", 0, [0.25], ok)
    journal.write("search", "low", "static_ratio", 1, [0.5], pruned)
    with path.open("a") as file:
        file.write('{"stage": "search", "regi')
    again = Journal(path, task(), {}, resume=True)
    assert again.find("search", "low", "static_ratio", 0) == ([0.25], ok)
    assert again.find("search", "low", "static_ratio", 1) == ([0.5], pruned)
    assert again.find("search", "low", "static_ratio", 2) is None
    assert path.read_text().endswith("}\n")
    with pytest.raises(OptionsError, match="resume=True"):
        Journal(path, task(), {}, resume=False)
    with pytest.raises(OptionsError, match=r"another task: sparsity was 0\.8, now 0\.7"):
        Journal(path, task(sparsity=0.7), {}, resume=True)
    empty = tmp_path / "empty.jsonl"
    Journal(empty, task(), {}, resume=False)
    assert not empty.exists()  # until there is something to go on with
    empty.write_text(path.read_text().splitlines()[0] + "\n")
    Journal(empty, task(sparsity=0.7), {}, resume=False).write("search", "low", "static_ratio", 0, [0.25], ok)
    assert Journal(empty, task(sparsity=0.7), {}, resume=True).find("search", "low", "static_ratio", 0)
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(OptionsError, match="not a journal"):
        Journal(tmp_path / "b.jsonl", task(), {}, resume=True)


def test_a_journal_of_an_earlier_version_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path, task(), {}, resume=False).write("search", "low", "static_ratio", 0, [0.25], Evaluation({}, "ok"))
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first.replace(f'"journal": {VERSION}', '"journal": 1'), *rest]) + "\n")
    for resume in (True, False):
        with pytest.raises(OptionsError, match=r"earlier version of the search.*Remove it and search anew"):
            Journal(path, task(), {}, resume=resume)


def test_boxes_survive_the_journal(tmp_path):
    chosen = task(fixed={"box": (2, 2, 4)})
    objective = Objective(chosen, "low")
    found = objective.evaluate("static_ratio", {**DEFAULTS, "sparsity": 0.8, "box": [2, 2, 4]})
    path = tmp_path / "a.jsonl"
    Journal(path, chosen, {}, resume=False).write("search", "low", "static_ratio", 0, [0.5], found)
    again = Journal(path, chosen, {}, resume=True)
    assert again.find("search", "low", "static_ratio", 0) == ([0.5], found)
