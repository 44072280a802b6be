"""The whole-step benchmark at a tiny size: the plumbing, not the figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cpu_step


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
