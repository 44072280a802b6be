"""`dynamicrad bench`: a table with the machine on top, JSON, and messages for what can't be measured."""

from __future__ import annotations

import json

import pytest
import torch

from dynamicrad_compile import cli

SMALL = ["bench", "--device", "cpu", "--tokens", "256", "--block-size", "16", "--repeats", "1"]


def test_attention_alone(capsys):
    assert cli.main([*SMALL, "--no-step", "--sparsity", "0.5"]) == 0
    about, _, header, row = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in about
    assert "blocks of 16" in about
    assert header.split()[:2] == ["what", "tokens"]
    assert row.split()[:2] == ["attention", "256"]


@pytest.mark.slow
def test_a_step_as_json(capsys):
    assert cli.main([*SMALL, "--json", "--heads", "2", "--head-dim", "16"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["what"] for row in rows] == ["attention", "step"]
    attention, step = rows
    assert attention["sparsity"] == step["sparsity"] > 0.5
    assert 1 < step["ideal"] < attention["ideal"]
    assert min(row["dense"] for row in rows) > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--sparsity", "1.5"], "sparsity"), (["--repeats", "0"], "at least 1"), (["--tokens", "9k"], "invalid choice")],
)
def test_mistakes(capsys, more, message):
    try:
        code = cli.main([*SMALL, *more])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
