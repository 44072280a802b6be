"""What the quality benchmark computes from its measurements."""

from __future__ import annotations

import numpy as np
import pytest
import quality_attention
import quality_figures
import quality_long
import quality_page
import torch


def test_statistics():
    x = np.arange(20.0)
    found = quality_figures.spearman(x, x**3, resamples=50)
    assert found["rho"] == pytest.approx(1.0)
    assert found["low"] == pytest.approx(1.0)
    drawn = np.random.default_rng(0).random(20)
    assert quality_figures.spearman(x, drawn, resamples=200)["low"] < 0

    class At:
        def __init__(self, step):
            self.step = step

    # Captured at 0 and 2: errors 0.2 and 0.4, so 0.3 in between; the first step may be dense.
    error = torch.tensor([[0.1, 0.3], [0.4, 0.4]])
    assert quality_attention.over_run([At(0), At(2)], error, 3) == pytest.approx(0.3)
    assert quality_attention.over_run([At(0), At(2)], error, 3, first=1) == pytest.approx(0.7 / 3)
    assert quality_page.table(["a", "b"], [["x", 0.12345]]).splitlines()[-1] == "| x | 0.123 |"


def test_longer_clips_ask_all_for_one_share():
    from dynamicrad_compile.quality.tiny_video.model import CHECKPOINT

    clips = torch.rand(2, 32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    row = {"frames": 32, "riflex": True, "method": "ours", "skipped": 0.5, "seconds": 1.0}
    found = {"subject": "x", "about": "y", "rows": [{**row, **quality_long.scores(clips, clips)}]}
    assert quality_long.page(found).splitlines()[-1].startswith("| 32 | yes | ours | 50.0% |")
    video = quality_long.longer(CHECKPOINT, 2, 2)
    assert video.grid == (32, 8, 8)
    assert quality_long.made("ours", video, 16, 16).wanted == pytest.approx(0.5 + quality_long.PAID[16])
    assert quality_long.made("radial", video, 16, 16).wanted == pytest.approx(0.5)
    assert quality_long.made("lvsa exact", video, 16, 16).options["rule"] == "exact"
