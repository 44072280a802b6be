"""The quickstart at a small size: it runs, replaces what it should, and writes its files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quickstart


def test_quickstart(tmp_path, monkeypatch, capsys):
    from PIL import Image

    widths = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "text_dim": 32}
    monkeypatch.setattr(quickstart, "WIDTHS", widths)
    size = ["--frames", "29", "--height", "256", "--width", "256", "--steps", "2", "--layers", "1", "--device", "cpu"]
    quickstart.main([*size, "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "2,048 video tokens" in out
    assert "1 of 1 video self-attentions replaced" in out
    assert "relative difference of the latents: 0." in out
    assert "says nothing about quality" in out
    with Image.open(tmp_path / "comparison.webp") as video:
        assert video.size == (512, 256)
        assert video.n_frames == 29
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.format == "PNG"
    assert "blocks.0.attn1" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("argv", [["--frames", "50"], ["--width", "500"], ["--steps", "1"]], ids=" ".join)
def test_quickstart_refuses_sizes_that_do_not_divide(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.parse(argv)
    assert stop.value.code == 2
    assert "must be" in capsys.readouterr().err
