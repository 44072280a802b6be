"""The prior's parameters, and candidates of dynamic_threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.plain import PLAIN

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.plans import prior
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.make import make_candidates, make_plan
from dynamicrad_compile.plans.patterns.dynamicrad import static_ratio_mask
from dynamicrad_compile.profiles.parameters import Prior

SHAPES = [
    (
        Prior(decay_factor=3.0, adjacent_width=0.4, far_width=2.0, temporal_decay=1.3, thinning=4.0),
        (7, 6, 11),
        16,
        0,
        0,
    ),
    (Prior(adjacent_width=2.5, far_width=0.1, temporal_decay=0.0, sink_frames=0), (5, 9, 7), 32, 19, 5),
    (Prior(thinning=8.0, sink_frames=2), (9, 8, 8), 64, 0, 40),
]


@pytest.mark.parametrize(("shape", "grid", "block", "before", "after"), SHAPES)
def test_scores_are_the_mass_of_every_pair_of_tokens(monkeypatch, shape, grid, block, before, after):
    monkeypatch.setattr(prior, "REPRESENTATIVES", block)
    layout = Layout(grid, block, before, after)
    f, h, w = grid
    token = np.arange(layout.video_tokens)
    frame, y, x = token // (h * w), token % (h * w) // w, token % w
    gap = np.abs(frame[:, None] - frame)
    gap = np.where(frame[None] < shape.sink_frames, np.minimum(gap, 1), gap)
    width = np.choose(np.minimum(gap, 2), [1.0, shape.adjacent_width, shape.far_width])
    core = max(prior.MIN_CORE, prior.CORE * shape.decay_factor * (h * w) ** 0.5)
    square = core**2 + ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2) / width**2
    step = np.maximum(1, np.floor(gap * shape.thinning / f))
    kept = (gap < 2) | (gap % step == 0)
    mass = kept * (1.0 + gap) ** -shape.temporal_decay * square**-1.5
    starts = np.flatnonzero(np.diff((token + before) // block, prepend=-1))
    blocks = np.unique((token + before) // block)
    expected = np.add.reduceat(np.add.reduceat(mass, starts, axis=0), starts, axis=1)
    rows = np.flatnonzero(~layout.text_blocks())
    rows = rows[(rows + 1) * block <= before + layout.video_tokens]  # full of video
    scores = prior.Scorer(layout, shape).scores(rows)[:, blocks]
    np.testing.assert_allclose(scores, expected[rows - blocks[0]], rtol=1e-4)


def test_the_same_place_in_adjacent_frames_is_never_dropped():
    layout = Layout((8, 8, 16), 64)
    shape = Prior(adjacent_width=0.1, far_width=10.0, temporal_decay=0.0, sink_frames=0)
    mask = static_ratio_mask(layout, sparsity=0.8, prior=shape)
    for row in range(2, 14):
        assert mask[row, [row - 2, row + 2]].all()


def test_compensation_is_paid_by_the_blocks():
    plain, compensated = (make_plan("dynamicrad", (8, 16, 16), 32, sparsity=0.8, compensate=c) for c in (0.0, 0.5))
    assert compensated.sparsity == pytest.approx(plain.sparsity, abs=0.003)
    assert int(compensated.kv_counts.sum()) < int(plain.kv_counts.sum())
    assert compensated.compensation().tolist() == [0.5]
    assert plain.compensation() is None
    assert make_plan("dynamicrad", (4, 8, 8), 32, sparsity=0.0, compensate=1.0).sparsity == 0.0


@pytest.mark.parametrize(("shape", "grid", "block", "before", "after"), SHAPES)
def test_candidates_are_the_static_plan_in_classes(shape, grid, block, before, after):
    params = {name: getattr(shape, name) for name in vars(shape)}
    found = make_candidates(grid, block, before, after, sparsity=0.5, **params)
    plan = make_plan("dynamicrad", grid, block, before, after, sparsity=0.5, **params)
    assert torch.equal(found.plan.block_mask(), plan.block_mask())
    layout = Layout(grid, block, before, after)
    f, hw = grid[0], grid[1] * grid[2]
    text = layout.text_blocks()
    for row in np.flatnonzero(~text):
        ids = found.plan.kv_indices[0, 0, row, : found.plan.kv_counts[0, 0, row]].tolist()
        forced, near = int(found.kv_forced[0, 0, row]), int(found.kv_near[0, 0, row])
        assert forced <= near <= len(ids)
        assert {row, *np.flatnonzero(text)} <= set(ids[:forced])

        def frames(blk):
            low, high = max(blk * block, before), min((blk + 1) * block, before + f * hw) - 1
            return range((low - before) // hw, (high - before) // hw + 1)

        close = {g for fr in frames(row) for g in (fr - 1, fr, fr + 1)} | set(range(shape.sink_frames))
        for place, blk in enumerate(ids):
            if place >= forced:
                assert (place < near) == bool(close & set(frames(blk))), (row, blk)


def test_bad_parameters():
    with pytest.raises(PlanError, match=r"adjacent_width must be in 0\.1\.\.10"):
        make_plan("dynamicrad", (4, 4, 4), 16, sparsity=0.5, adjacent_width=0.0)
    with pytest.raises(PlanError, match=r"unknown parameter 'far_widht'.*Did you mean 'far_width'"):
        make_candidates((4, 4, 4), 16, sparsity=0.5, far_widht=1.0)
    with pytest.raises(PlanError, match=r"no dynamic_threshold table for regime 'mid'"):
        make_candidates((4, 4, 4), 16, profile=PLAIN)
