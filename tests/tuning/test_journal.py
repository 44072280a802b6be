"""The journal survives a crash and refuses those of other tasks."""

from __future__ import annotations

import pytest
from support.tuning import task

from dynamicrad_compile.errors import OptionsError
from dynamicrad_compile.tuning.journal import Journal
from dynamicrad_compile.tuning.objective import Objective
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
