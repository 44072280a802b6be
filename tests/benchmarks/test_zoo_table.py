"""The table of the zoo on small cases: exact, dense, failing; the models of the zoo have tests of their own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import zoo_table
from support.tiny_dit import TinyDiT


class Tiny(TinyDiT):
    def __init__(self, causal=False):
        super().__init__(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def tiny(f=4, h=4, w=6, **how):
    expected = {"grid": (f, h, w), "n_text_before": 0, "n_text_after": 0, "n_video_self_attn_nodes": 1}
    expected["kv_extra_before"] = 0
    return Tiny(**how), {"latents": torch.randn(1, 3, f, 2 * h, 2 * w)}, expected


def causal(f=4, h=4, w=6):
    return tiny(f, h, w, causal=True)


def wrong(f=4, h=4, w=6):
    model, kwargs, expected = tiny(f, h, w)
    return model, kwargs, expected | {"grid": (f, w, h)}


def broken():
    raise ValueError("no such model")


def test_table_of_small_cases(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo_table, "CASES", {f.__name__: f for f in (tiny, causal, wrong, broken)})
    monkeypatch.setattr(zoo_table, "RESULTS", tmp_path)
    monkeypatch.setattr(zoo_table.models_page, "ROWS", tmp_path / "zoo.json")
    monkeypatch.setattr(zoo_table.models_page, "PAGE", tmp_path / "models.md")
    exact, dense, bad, failed = zoo_table.main(["--save"])
    assert (exact.expected, exact.found, exact.replaced, exact.grid_right) == (1, 1, 1, True)
    assert exact.full_error < 1e-5
    assert exact.sparse_error < 1e-5
    assert exact.graphs == 1
    assert exact.recompiles <= 2
    assert exact.passes > 0
    assert (dense.replaced, dense.reasons) == (0, ["causal attention"])
    assert bad.grid_right is False
    assert failed.failure == "ValueError: no such model"
    page = (tmp_path / "zoo.md").read_text()
    assert "4 cases: 1 exact, 1 dense with a reason, 1 wrong, 1 failed." in page
    assert "- causal: causal attention" in page
    assert zoo_table.table([exact]).splitlines()[2] in capsys.readouterr().out
    assert str(Path.home()) not in page
