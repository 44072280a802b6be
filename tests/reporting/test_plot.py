"""Plots are readable PNG files; a missing pillow is an error that says what to install."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.plans.plan import BlockPlan
from dynamicrad_compile.reporting import plot
from dynamicrad_compile.reporting.plot import frame_boundaries, plot_difference, plot_mask
from dynamicrad_compile.reporting.plot_text import average, mask_text


def cell(image, blocks, row, column):
    """Colour in the middle of a cell of a picture with `blocks` blocks a side."""
    scale = -(-plot.MIN_PIXELS // blocks)
    return image.getpixel((plot.MARGIN_LEFT + int((column + 0.5) * scale), plot.MARGIN_TOP + int((row + 0.5) * scale)))


def small_plan():
    # Regime 0, head 0: diagonal. Regime 1, head 0: last column.
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    mask[0, 0] = torch.eye(5, dtype=torch.bool)
    mask[1, 0, :, -1] = True
    return BlockPlan.from_mask(mask, block_q=16, block_kv=16, q_len=77, kv_len=77)


@pytest.mark.parametrize("regime", [0, 1])
def test_cells_show_the_mask(tmp_path, regime):
    plot_mask(small_plan(), tmp_path / "mask.png", regime=regime)
    image = Image.open(tmp_path / "mask.png").convert("RGB")
    mask = small_plan().block_mask()[regime, 0]
    for row in range(5):
        for column in range(5):
            expected = plot.KEPT if mask[row, column] else plot.SKIPPED
            assert cell(image, 5, row, column) == expected


def test_small_masks_are_scaled_up_and_it_is_a_png(tmp_path):
    plot_mask(small_plan(), str(tmp_path / "mask"), title="tiny")
    image = Image.open(tmp_path / "mask")
    assert image.format == "PNG"
    assert min(image.size) >= 600


def test_large_masks_are_averaged():
    mask = np.zeros((2501, 1300), dtype=bool)
    mask[0, 0] = True
    mask[-1, -2:] = True
    share = average(mask.astype(float)[..., None], plot.MAX_BLOCKS)[..., 0]
    assert share.shape == (834, 650)
    assert share[0, 0] == pytest.approx(1 / 6)
    assert share[-1, -1] == pytest.approx(1 / 2)  # 2 rows are left for the last tile


def test_frames_and_text_are_drawn(tmp_path):
    grid = (3, 8, 8)
    plan = make_plan("dense", grid, 16, text_before=32, text_after=16)
    bare, marked = tmp_path / "bare.png", tmp_path / "marked.png"
    plot_mask(plan, bare)
    plot_mask(plan, marked, boundaries=frame_boundaries(grid, 32))
    bare, marked = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (bare, marked))
    scale = plot.MIN_PIXELS // 15
    for frame in range(4):
        column = plot.MARGIN_LEFT + (2 + 4 * frame) * scale
        assert (bare[plot.MARGIN_TOP + 5 : plot.MARGIN_TOP + 700, column] == plot.KEPT).all()
        assert (marked[plot.MARGIN_TOP + 5 : plot.MARGIN_TOP + 700, column] != plot.KEPT).any(axis=-1).all()
    above = marked[plot.MARGIN_TOP - 6]
    text = (above == plot.TEXT_BAND).all(axis=-1)
    assert text[plot.MARGIN_LEFT + scale]
    assert text[plot.MARGIN_LEFT + 14 * scale + scale // 2]
    assert not text[plot.MARGIN_LEFT + 7 * scale]


def test_frame_boundaries():
    assert frame_boundaries((3, 2, 5), 7) == [7, 17, 27, 37]


def test_difference_colours(tmp_path):
    ours = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    theirs = np.array([[1, 0], [1, 1]], dtype=bool)
    plot_difference(ours, theirs, tmp_path / "d.png", block_size=16, seq_len=40, names=("ours", "theirs"))
    image = Image.open(tmp_path / "d.png").convert("RGB")
    expected = [
        [plot.KEPT, plot.ONLY_FIRST, plot.NO_ROW],
        [plot.ONLY_SECOND, plot.KEPT, plot.NO_ROW],
        [plot.NO_ROW] * 3,
    ]
    assert [[cell(image, 3, row, column) for column in range(3)] for row in range(3)] == expected


def test_difference_of_masks_that_do_not_fit(tmp_path):
    small, large = np.eye(2, dtype=bool), np.eye(3, dtype=bool)
    with pytest.raises(PlanError, match="m <= n"):
        plot_difference(small, large, tmp_path / "d.png", block_size=16, seq_len=32)


@pytest.mark.parametrize(("name", "index"), [("regime", 2), ("head", 1), ("head", -1)])
def test_unknown_regime_or_head(tmp_path, name, index):
    with pytest.raises(PlanError, match=rf"{name} must be in 0\.\.\d for this plan, got {index}"):
        plot_mask(small_plan(), tmp_path / "mask.png", **{name: index})


def test_missing_pillow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(PlanError, match=r"pip install 'pillow>=10'"):
        plot_mask(small_plan(), tmp_path / "mask.png")


def test_text_shows_every_block():
    plan = small_plan()
    mask = plan.block_mask()[0, 0].numpy()
    title, *rows, legend = mask_text(plan, title="small").splitlines()
    assert title.startswith("small: ")
    assert [[character == "#" for character in row] for row in rows] == mask.tolist()
    assert {*"".join(rows)} <= {"#", "."}
    assert "a character" not in legend


def test_text_of_many_blocks_is_averaged():
    plan = make_plan("radial", grid=(7, 20, 20), block_size=16)
    lines = mask_text(plan).splitlines()
    assert len(lines) == 2 + plan.num_q_blocks // 2 + plan.num_q_blocks % 2
    assert {len(line) for line in lines[1:-1]} == {-(-plan.num_kv_blocks // 2)}
    assert "a character is 2 x 2 blocks" in lines[-1]
