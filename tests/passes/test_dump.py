"""Option `dump`: each graph in files before the passes and after each; it never fails a compilation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.conditioned import Model
from support.plain import PLAIN
from support.tiny_dit import LATENTS, TinyDiT
from torch.utils.checkpoint import checkpoint

import dynamicrad_compile as drad
from dynamicrad_compile.errors import OptionsError
from dynamicrad_compile.options import Options
from dynamicrad_compile.passes import PASSES, dump

SMALL = {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "sparsity": 0.5}
STEPS = ["captured", *(step.__name__ for step in PASSES)]


def tiny():
    return TinyDiT(F.scaled_dot_product_attention)


def files(folder):
    return [path.name for path in sorted(Path(folder).iterdir())]


def test_a_file_for_each_pass_with_sites_marked(tmp_path):
    report = drad.explain(tiny(), LATENTS, options={**SMALL, "dump": tmp_path / "new" / "folder"})
    (folder,) = report.dumps
    assert Path(folder) == tmp_path / "new" / "folder" / "graph_000"
    assert f"written: {folder}" in report.summary()
    assert files(folder) == [f"{i}_{step}.txt" for i, step in enumerate(STEPS)]
    texts = {step: (Path(folder) / f"{i}_{step}.txt").read_text(encoding="utf-8") for i, step in enumerate(STEPS)}
    sites = {step: marked(text) for step, text in texts.items()}
    assert not sites["captured"]
    assert "scaled_dot_product_attention(" in sites["build_plans"][0][1]
    assert "video_self_attention; grid 4x3x5, text 0+0; planned, 50.0% skipped" in sites["build_plans"][0][0]
    assert "dim 2 of l_latents_" in sites["trace_grid"][0][0]
    mark, line = sites["replace_attention"][0]
    assert "replaced" in mark
    assert "dynamicrad.block_sparse_attention.default(" in line
    assert "the graph changed" in texts["replace_attention"]
    assert "float32[2, 2, 60, 16]" in texts["captured"]


def marked(text):
    """(mark, the line below it) of each mark in a file."""
    lines = text.splitlines()
    return [(line, lines[i + 1]) for i, line in enumerate(lines) if line.startswith("# >>>")]


def test_dense_site_shows_its_code(tmp_path):
    (folder,) = drad.explain(tiny(), LATENTS, options={"min_tokens": 1000, "dump": tmp_path}).dumps
    assert "dense, few_tokens: 60 tokens" in (Path(folder) / "7_build_plans.txt").read_text(encoding="utf-8")


def test_conditions_are_marked(tmp_path):
    inputs = (LATENTS[:1], torch.tensor([500.0]), torch.randn(1, 7, 8), torch.ones(1, 1), torch.arange(60))
    (folder,) = drad.explain(Model(), *inputs, options={**SMALL, "dump": tmp_path}).dumps
    marks = marked((Path(folder) / "6_find_conditions.txt").read_text(encoding="utf-8"))
    assert ("# >>> timestep", "l_b_: float32[1]  # input") in marks
    assert ("# >>> prompt", "l_c_: float32[1, 7, 8]  # input") in marks


def test_checkpoints_are_shown_open_and_closed(tmp_path):
    model = tiny()
    latents = LATENTS.clone().requires_grad_()
    compiled = drad.compile(
        lambda x: checkpoint(model, x, use_reentrant=False), **SMALL, inner="eager", dump=str(tmp_path)
    )
    compiled(latents)
    (folder,) = tmp_path.iterdir()
    assert files(folder)[-1] == "9_regions_closed.txt"
    opened, closed = ((folder / name).read_text(encoding="utf-8") for name in files(folder)[-2:])
    assert "region_begins(" in opened
    assert "region_begins(" not in closed


def test_by_name_and_rewrite_and_several_graphs(tmp_path):
    model, options = tiny(), {**SMALL, "dump": tmp_path, "inner": "eager"}
    with torch.no_grad():
        compiled = torch.compile(model, backend="dynamicrad", options=options)
        compiled(LATENTS)
        compiled(LATENTS[:, :, :3])  # compiled again
    program = torch.export.export(model, (LATENTS,))
    _, report = drad.rewrite(program, {**SMALL, "dump": tmp_path})
    found = [*drad.report(compiled).dumps, *report.dumps]
    assert len(found) == 3
    assert sorted(map(Path, found)) == sorted(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_do_not_overwrite_each_other(tmp_path):
    code = "import sys; from pathlib import Path; from dynamicrad_compile.passes.dump import Dump\n"
    code += "for _ in range(20): print(Dump(Path(sys.argv[1])).folder)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made = [line for process in running for line in process.communicate()[0].split()]
    assert len(set(made)) == len(made) == 40


def test_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMICRAD_DUMP", str(tmp_path / "variable"))
    assert Options().dump == tmp_path / "variable"
    assert Options(dump=tmp_path / "option").dump == tmp_path / "option"
    monkeypatch.setenv("DYNAMICRAD_DUMP", "")
    assert Options().dump is None


def test_what_is_no_folder_is_an_error_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OptionsError, match=r"dump.*expected a folder"):
        drad.compile(tiny(), dump=tmp_path / "file")


def test_an_error_while_writing_is_a_note(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(dump, "write_file", full)
    report = drad.explain(tiny(), LATENTS, options={**SMALL, "dump": tmp_path})
    assert len(report.replaced) == 1
    assert "option dump: no space left" in report.notes
