"""The static_ratio planner meets its budget on any grid, keeps what is forced, and is deterministic."""

import numpy as np
import pytest

from dynamicrad_compile.errors import PlanError, ProfileError
from dynamicrad_compile.plans import prior
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.plans.patterns import dynamicrad
from dynamicrad_compile.plans.patterns.dynamicrad import static_ratio_mask
from dynamicrad_compile.profiles import load_profile
from dynamicrad_compile.profiles.parameters import Prior

SPARSITIES = [0.3, 0.425, 0.5, 0.61, 0.7, 0.8, 0.87, 0.9, 0.95]
GRIDS = [
    ((21, 45, 80), 128, 0, 0),
    ((21, 30, 52), 128, 0, 226),
    ((13, 30, 45), 64, 226, 0),
    ((5, 7, 11), 16, 0, 0),
    ((31, 1, 17), 16, 3, 5),
    ((300, 1, 1), 16, 0, 0),
    ((1, 1, 389), 32, 0, 0),
    ((3, 16, 16), 64, 64, 64),
]


def grid_id(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def forced_share(layout):
    """Share of blocks that is always kept: the diagonal, text rows and text columns."""
    text = layout.text_blocks()
    return (np.eye(len(text), dtype=bool) | text | text[:, None]).mean()


@pytest.mark.parametrize(("grid", "block_size", "before", "after"), GRIDS, ids=grid_id)
def test_achieved_sparsity_is_the_asked_one(grid, block_size, before, after):
    forced = forced_share(Layout(grid, block_size, before, after))
    for sparsity in SPARSITIES:
        plan = make_plan("dynamicrad", grid, block_size, before, after, sparsity=sparsity)
        assert plan.sparsity == pytest.approx(min(sparsity, 1 - forced), abs=0.01)


def test_achieved_sparsity_on_random_grids():
    rng = np.random.default_rng(2)
    checked = 0
    while checked < 150:
        grid = tuple(int(x) for x in rng.integers(1, (30, 40, 40)))
        text = tuple(int(x) for x in rng.choice([0, 0, 7, 77, 256], size=2))
        layout = Layout(grid, int(rng.choice([16, 32, 64, 128])), *text)
        if not 12 <= layout.num_blocks <= 500:
            continue
        sparsity = float(rng.uniform(0.3, 0.95))
        kept = static_ratio_mask(layout, sparsity=sparsity).mean()
        expected = max(1 - sparsity, forced_share(layout))
        assert kept == pytest.approx(expected, abs=0.01), f"{layout} {sparsity}"
        checked += 1


@pytest.mark.parametrize(("grid", "block_size", "before", "after"), GRIDS, ids=grid_id)
def test_text_and_diagonal_are_always_kept(grid, block_size, before, after):
    layout = Layout(grid, block_size, before, after)
    text = layout.text_blocks()
    mask = static_ratio_mask(layout, sparsity=0.95)
    assert mask.diagonal().all()
    assert mask[text].all()
    assert mask[:, text].all()


@pytest.mark.parametrize(("grid", "block_size", "before", "after"), GRIDS, ids=grid_id)
def test_rows_without_text_differ_by_at_most_one_block(grid, block_size, before, after):
    layout = Layout(grid, block_size, before, after)
    counts = static_ratio_mask(layout, sparsity=0.7)[~layout.text_blocks()].sum(axis=1)
    assert counts.max() - counts.min() <= 1


def test_budget_smaller_than_the_forced_blocks_keeps_just_those():
    layout = Layout((4, 4, 4), 16, 32, 0)
    text = layout.text_blocks()
    mask = static_ratio_mask(layout, sparsity=0.95)
    np.testing.assert_array_equal(mask, np.eye(len(text), dtype=bool) | text | text[:, None])


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_extremes(sparsity):
    mask = static_ratio_mask(Layout((3, 5, 13), 16), sparsity=sparsity)
    expected = np.ones_like(mask) if sparsity == 0.0 else np.eye(len(mask), dtype=bool)
    np.testing.assert_array_equal(mask, expected)


def test_more_sparsity_keeps_a_subset():
    layout = Layout((9, 12, 20), 64)
    wide, narrow = (static_ratio_mask(layout, sparsity=s) for s in (0.5, 0.8))
    assert not (narrow & ~wide).any()


def test_rows_keep_the_blocks_of_largest_prior_mass(monkeypatch):
    # Ragged: 130 tokens a frame in blocks of 16. With every query token as representative the mass is exact.
    monkeypatch.setattr(prior, "REPRESENTATIVES", 16)
    layout = Layout((6, 10, 13), 16)
    token = np.arange(layout.video_tokens)
    frame, y, x = token // 130, token % 130 // 13, token % 13
    gap = np.abs(frame[:, None] - frame).astype(float)
    gap[:, frame < 1] = np.minimum(gap[:, frame < 1], 1)
    square = max(0.5, prior.CORE * 130**0.5) ** 2 + (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    starts = np.arange(0, 780, 16)
    mass = np.add.reduceat(np.add.reduceat((1 + gap) ** -2 * square**-1.5, starts, axis=0), starts, axis=1)
    mask = static_ratio_mask(layout, sparsity=0.7)[:-1]  # the last block has 12 query tokens, not 16
    worst_kept = np.where(mask, mass[:-1], np.inf).min(axis=1)
    best_skipped = np.where(mask, 0, mass[:-1]).max(axis=1)
    assert (worst_kept >= best_skipped * (1 - 1e-4)).all()


def test_few_representatives_lose_little_of_the_mass(monkeypatch):
    layout = Layout((7, 18, 29), 64)
    few = static_ratio_mask(layout, sparsity=0.8)
    monkeypatch.setattr(prior, "REPRESENTATIVES", 64)
    every = static_ratio_mask(layout, sparsity=0.8)
    scores = prior.Scorer(layout, Prior()).scores(np.arange(layout.num_blocks))
    assert scores[few].sum() > 0.99 * scores[every].sum()


def test_sink_frame_counts_as_adjacent():
    layout = Layout((16, 8, 16), 128)  # one block a frame
    with_sink = static_ratio_mask(layout, sparsity=0.75, prior=Prior(sink_frames=1))
    without = static_ratio_mask(layout, sparsity=0.75, prior=Prior(sink_frames=0))
    assert with_sink[:, 0].all()
    assert not without[8:, 0].any()


def test_larger_decay_factor_keeps_more_of_the_own_frame():
    layout = Layout((12, 16, 16), 32)
    own_frame = np.kron(np.eye(12, dtype=bool), np.ones((8, 8), dtype=bool))
    kept = [
        (static_ratio_mask(layout, sparsity=0.8, prior=Prior(decay_factor=g, sink_frames=0)) & own_frame).sum()
        for g in (0.1, 1.0, 10.0, 100.0)
    ]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_same_plan_in_any_chunking(monkeypatch):
    layout = Layout((9, 13, 17), 32, 19, 3)
    whole = static_ratio_mask(layout, sparsity=0.8)
    np.testing.assert_array_equal(static_ratio_mask(layout, sparsity=0.8), whole)
    monkeypatch.setattr(dynamicrad, "CHUNK_ELEMENTS", 1)
    np.testing.assert_array_equal(static_ratio_mask(layout, sparsity=0.8), whole)


def test_equal_scores_go_to_the_nearer_then_the_earlier_block():
    keys = dynamicrad._sort_keys(np.ones((1, 5), dtype=np.float32), np.array([2]))
    assert np.argsort(-keys[0]).tolist() == [2, 1, 3, 0, 4]


def test_sparsity_comes_from_the_regime_of_the_profile(tmp_path):
    profile = load_profile("default")
    for name in ("low", "mid", "high"):
        plan = make_plan("dynamicrad", (21, 30, 52), regime=name)
        assert plan.sparsity == pytest.approx(profile.regime(name).static_ratio.sparsity, abs=0.01)
    default = make_plan("dynamicrad", (21, 30, 52))
    assert default.block_mask().equal(make_plan("dynamicrad", (21, 30, 52), regime="mid").block_mask())
    assert default.block_mask().equal(make_plan("dynamicrad", (21, 30, 52), profile=profile).block_mask())
    with pytest.raises(ProfileError, match="no profile"):
        make_plan("dynamicrad", (21, 30, 52), profile=str(tmp_path / "absent.toml"))
    with pytest.raises(ProfileError, match=r"regime 'hig'.*Did you mean 'high'"):
        make_plan("dynamicrad", (21, 30, 52), regime="hig")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sparsity": 80}, "sparsity must be in 0..1, got 80"),
        ({"sparsity": -0.1}, "sparsity must be in 0..1"),
        ({"sparsity": True}, "sparsity must be a number"),
        ({"sparsity": 0.8, "decay_factor": 1e6}, "decay_factor must be in 0.001..1000"),
        ({"sparsty": 0.8}, "Did you mean 'sparsity'"),
    ],
    ids=["percent", "negative", "bool", "decay", "typo"],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(PlanError, match=message):
        make_plan("dynamicrad", (2, 4, 4), 16, **params)
