"""LVSA's masks against sets of frames and masks of tokens, written out; budgets; blocks that straddle frames."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

import dynamicrad_compile as drad
from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.plans import layout as layouts
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.patterns import lvsa
from dynamicrad_compile.plans.patterns.lvsa import block_size_for, efficiency, frame_mask, key_frame_interval, lvsa_mask
from dynamicrad_compile.profiles.parameters import LVSA


def published_interval(frames, p):
    """The distance of globals by the published rule, by counting."""
    scaled = max(p.n_first + 1, int(p.reference_frames * p.sparsity_scale))
    if frames <= scaled:
        return 1
    target = max(p.n_first, scaled - min(2 * p.window + 1, frames))
    strict = max(k for k in range(1, frames + 1) if len(set(range(p.n_first)) | set(range(0, frames, k))) >= target)
    m = 2 * p.window + p.n_first
    return max(strict, math.ceil(max(frames - m, scaled - m) / max(scaled - m, 1)))


def published_reads(frames, p):
    """Set of frames that each frame reads by the published rule: a range that grows left and right in turn."""
    interval = published_interval(frames, p)
    offset = p.step % interval
    everywhere = set(range(min(p.n_first, frames)))
    everywhere |= {(offset + i * interval) % frames for i in range(math.ceil(frames / interval))}
    reads = []
    for f in range(frames):
        if p.window == 0:
            reads.append(set(everywhere))
            continue
        width = 2 * p.window + 1
        low = max(0, min(f - p.window, frames - width))
        high = min(frames - 1, max(f + p.window, width - 1))
        enough = min(width, frames - len(everywhere))
        while len(set(range(low, high + 1)) - everywhere) < enough:
            low = max(0, low - 1)
            if len(set(range(low, high + 1)) - everywhere) < enough:
                high = min(frames - 1, high + 1)
        reads.append(everywhere | set(range(low, high + 1)))
    return reads


def exact_reads(frames, p):
    """Set of frames that each frame reads by the exact rule."""
    target = max(p.n_first + 1, int(p.reference_frames * p.sparsity_scale))
    if frames <= target:
        return [set(range(frames)) for _ in range(frames)]
    width = min(2 * p.window + 1, target - p.n_first) if p.window else 0
    rotating, rest = target - width - p.n_first, frames - p.n_first
    interval = math.ceil(rest / rotating) if rotating else 1
    places = {(p.step % interval + i * rest // rotating) % rest for i in range(rotating)}
    everywhere = set(range(p.n_first)) | {p.n_first + place for place in places}
    reads = []
    for f in range(frames):
        others = sorted(set(range(frames)) - everywhere, key=lambda other: (abs(other - f), other))
        reads.append(everywhere | set(others[:width]))
    return reads


READS = {"published": published_reads, "exact": exact_reads}


def drawn(seed, rule):
    """Random parameters."""
    rng = np.random.default_rng(seed)
    return LVSA(
        reference_frames=int(rng.integers(1, 34)),
        window=int(rng.integers(0, 6)),
        n_first=int(rng.integers(0, 4)),
        sparsity_scale=float(rng.choice([0.3, 0.5, 1.0, 1.4])),
        step=int(rng.integers(0, 60)),
        rule=rule,
    )


def as_sets(mask):
    return [set(np.flatnonzero(row).tolist()) for row in mask]


@pytest.mark.parametrize("rule", READS)
def test_frames_are_those_of_the_sets(rule):
    for seed in range(300):
        parameters = drawn(seed, rule)
        frames = seed % 97 + 1
        assert as_sets(frame_mask(frames, parameters)) == READS[rule](frames, parameters), (frames, parameters)
        if rule == "published":
            assert key_frame_interval(frames, parameters) == published_interval(frames, parameters)


@pytest.mark.parametrize(("frames", "reference", "published"), [(22, 21, 18), (41, 33, 28)])
def test_the_published_rule_reads_fewer_frames_than_it_should(frames, reference, published):
    assert frame_mask(frames, LVSA(reference_frames=reference)).sum(1).tolist() == [published] * frames
    exact = LVSA(reference_frames=reference, rule="exact")
    assert frame_mask(frames, exact).sum(1).tolist() == [reference] * frames


@pytest.mark.parametrize(("window", "n_first", "reference"), [(3, 1, 21), (0, 1, 13), (4, 2, 8), (3, 0, 5), (5, 3, 4)])
def test_the_exact_rule_has_its_budget_for_every_video_and_step(window, n_first, reference):
    for frames in range(1, 201):
        values = {"window": window, "n_first": n_first, "reference_frames": reference, "rule": "exact"}
        interval = key_frame_interval(frames, LVSA(**values))
        seen = np.zeros(frames, dtype=bool)
        globals_of = set()
        for step in range(interval):
            parameters = LVSA(**values, step=step)
            assert set(frame_mask(frames, parameters).sum(1).tolist()) == {min(reference, frames)}
            found = lvsa.global_frames(frames, parameters)
            globals_of.add(int(found.sum()))
            seen |= found
            if frames > reference:  # evenly spaced on the circle behind the first frames
                places = np.flatnonzero(found[n_first:])
                gaps = np.diff(np.append(places, places[:1] + frames - n_first))
                assert len(gaps) == 0 or np.ptp(gaps) <= 1
        assert len(globals_of) == 1
        rotates = frames <= reference or reference > n_first + (min(2 * window + 1, reference) if window else 0)
        assert seen.all() == (rotates or frames == n_first)


@pytest.mark.parametrize("rule", READS)
def test_masks_repeat_after_the_interval(rule):
    for seed in range(60):
        parameters = drawn(seed, rule)
        frames = seed + 5
        interval = key_frame_interval(frames, parameters)
        later = parameters.model_copy(update={"step": parameters.step + interval})
        assert (frame_mask(frames, parameters) == frame_mask(frames, later)).all()


def layouts_of(number, seed):
    """Random layouts: ragged frames, text in front and behind, queries that are a range of the keys."""
    rng = np.random.default_rng(seed)
    for k in range(number):
        block = int(rng.choice([16, 32]))
        grid = tuple(int(x) for x in rng.integers((3, 1, 2), (14, 7, 9)))
        text = tuple(int(x) for x in rng.choice([0, 0, 5, block, 37], size=2))
        tokens = math.prod(grid) + sum(text)
        queries = None
        if k % 3 == 1:
            queries = tuple(sorted(int(x) for x in rng.choice(tokens + 1, size=2, replace=False)))
        if k % 3 == 2:  # the last frames behind a cache
            queries = (text[0] + math.prod(grid) - grid[1] * grid[2] * int(rng.integers(1, 3)), tokens - text[1])
        yield Layout(grid, block, *text, queries=queries)


def slow(layout, parameters):
    """(wanted pairs of tokens, bool [queries, keys]; block mask, own blocks included)."""
    frame = np.full(layout.seq_len, -1)
    frame[layout.text_before :][: layout.video_tokens] = np.arange(layout.video_tokens) // layout.tokens_per_frame
    reads = READS[parameters.rule](layout.frames, parameters)
    start, stop = layout.queries or (0, layout.seq_len)
    wanted = np.array(
        [[a < 0 or b < 0 or b in reads[a] for b in frame.tolist()] for a in frame[start:stop].tolist()], dtype=bool
    )
    mask = np.zeros((layout.num_rows, layout.num_blocks), dtype=bool)
    for row in range(layout.num_rows):
        inside = slice(row * layout.block_size, (row + 1) * layout.block_size)
        for column in range(layout.num_blocks):
            mask[row, column] = wanted[inside, column * layout.block_size :][:, : layout.block_size].any()
        held = Counter(token // layout.block_size for token in range(start, stop)[inside])
        mask[row, max(sorted(held), key=held.get)] = True
    return wanted, mask


@pytest.mark.parametrize("rule", READS)
def test_blocks_hold_all_wanted_pairs_of_tokens_and_no_other_block_is_kept(rule):
    for seed, layout in enumerate(layouts_of(30, 0)):
        parameters = drawn(seed, rule).model_copy(update={"reference_frames": 2 + seed % 7})
        wanted, mask = slow(layout, parameters)
        np.testing.assert_array_equal(lvsa_mask(layout, parameters), mask)
        computed = np.repeat(np.repeat(mask, layout.block_size, 0), layout.block_size, 1)[: len(wanted)]
        assert efficiency(layout, parameters) == pytest.approx(wanted.sum() / computed[:, : layout.seq_len].sum())


def test_make_plan_is_the_mask_and_only_step_and_rule_change_it():
    values = {"reference_frames": 6, "window": 1, "n_first": 1, "sparsity_scale": 1.0}
    plans = [drad.make_plan("lvsa", (13, 4, 5), 16, 3, 2, step=s, **values) for s in range(8)]
    for step, plan in enumerate(plans):
        found = lvsa_mask(Layout((13, 4, 5), 16, 3, 2), LVSA(**values, step=step))
        np.testing.assert_array_equal(plan.block_mask()[0, 0].numpy(), found)
    interval = key_frame_interval(13, LVSA(**values))
    assert plans[0].block_mask().equal(plans[interval].block_mask())
    assert not plans[0].block_mask().equal(plans[1].block_mask())
    short = drad.make_plan("lvsa", (21, 4, 4), 16)
    assert short.sparsity == 0.0
    assert drad.make_plan("lvsa", (42, 4, 4), 16, rule="exact").sparsity == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rule": "best"}, "rule = 'best': Input should be 'published' or 'exact'"),
        ({"step": -1}, "step must be an integer of at least 0, got -1"),
        ({"reference_frames": 0}, "reference_frames must be an integer of at least 1, got 0"),
        ({"sparsity_scale": 0.0}, "sparsity_scale must be in 0.01..100, got 0.0"),
        ({"windows": 3}, "Did you mean 'window'?"),
        ({"box": (4, 2, 2)}, "unknown parameter 'box'"),
    ],
    ids=str,
)
def test_mistakes_are_named(values, said):
    with pytest.raises(PlanError) as error:
        drad.make_plan("lvsa", (9, 4, 4), 16, **values)
    assert said in str(error.value)


@pytest.mark.parametrize("grid", [(42, 30, 52), (61, 30, 53), (52, 30, 45), (61, 22, 40)])
def test_real_grids_waste_less_than_a_tenth_in_blocks_of_128(grid):
    text = 226 if grid == (52, 30, 45) else 0
    assert efficiency(Layout(grid, 128, text)) >= 0.9
    assert block_size_for(grid, text) == 128


def test_the_largest_efficient_block_size_is_taken(monkeypatch):
    grid = (42, 8, 8)
    assert [round(efficiency(Layout(grid, size)), 2) for size in (64, 128)] == [1.0, 0.65]
    assert block_size_for(grid) == 64
    assert block_size_for(grid, wanted=32) == 32
    assert block_size_for((42, 3, 3)) == 16  # none is efficient: the best
    monkeypatch.setattr(layouts, "MAX_BLOCKS", 24)  # smaller ones cut into too many blocks
    assert block_size_for((42, 8, 8)) == 128
    with pytest.raises(PlanError, match="wanted must be one of"):
        block_size_for(grid, wanted=100)
    with pytest.raises(PlanError, match="more than the 24"):
        block_size_for(grid, wanted=64)
