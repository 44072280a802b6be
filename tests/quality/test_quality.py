"""Quality: metrics on known inputs, clips made to fail rank rightly, masks and hook exact, the harness resumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from support.clips import frozen, half_frozen, looping, moving, noise, noisy
from support.graphs import relative_error
from support.plain import PLAIN
from support.subject import GRID, tiny

import dynamicrad_compile as drad
from dynamicrad_compile import quality
from dynamicrad_compile.errors import DynamicRadError
from dynamicrad_compile.kernels.attention_reference import block_sparse_attention_reference
from dynamicrad_compile.plans.make import make_candidates
from dynamicrad_compile.plans.ratios import ratios_for
from dynamicrad_compile.quality import blocks, features, methods, metrics
from dynamicrad_compile.quality.pictures import read_clip
from dynamicrad_compile.quality.subject import load_subject


def test_psnr_and_ssim_of_known_clips():
    clip = moving(6)
    assert float(metrics.psnr(clip, clip)) == metrics.MAX_PSNR
    assert float(metrics.psnr(torch.full_like(clip, 0.5), torch.full_like(clip, 0.6))) == pytest.approx(20.0, abs=1e-5)
    assert float(metrics.ssim(clip, clip)) == pytest.approx(1.0)
    # Two constant pictures: only the luminance term (2ab + c1) / (a^2 + b^2 + c1) is left.
    found = float(metrics.ssim(torch.full_like(clip, 0.5), torch.full_like(clip, 0.6)))
    assert found == pytest.approx((2 * 0.3 + 1e-4) / (0.25 + 0.36 + 1e-4), abs=1e-6)


def test_motion_and_flicker_of_known_clips():
    ramp = torch.linspace(0, 1, 9)[None, :, None, None, None].expand(1, 9, 3, 16, 16)
    assert float(metrics.motion(ramp)) == pytest.approx(1 / 8)
    assert float(metrics.flicker(ramp)) == pytest.approx(0.0, abs=1e-9)
    assert float(metrics.flicker(noise(64))) == pytest.approx(3.0, rel=0.02)
    in_turn = torch.tensor([0.2, 0.8]).repeat(8)[None, :, None, None, None].expand(1, 16, 3, 16, 16)
    assert float(metrics.flicker(in_turn)) == pytest.approx(4.0)
    assert math.isnan(float(metrics.flicker(frozen(8))))
    half = 0.5 + 0.5 * (moving(9) - 0.5)
    assert float(metrics.motion_ratio(half, moving(9))) == pytest.approx(0.25, rel=1e-5)


def test_feature_distance_and_frechet_rank_damage():
    clip = torch.cat([moving(8, speed) for speed in (0.3, 0.7, 1.1, 1.5)])
    slight, strong = noisy(clip, 0.02), noisy(clip, 0.1)
    assert float(features.feature_distance(clip, clip).max()) == 0.0
    assert (features.feature_distance(slight, clip) < features.feature_distance(strong, clip)).all()
    assert features.frechet_distance(clip, clip) == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < features.frechet_distance(slight, clip) < features.frechet_distance(strong, clip)
    # In one dimension and by hand: |m1 - m2|^2 + (s1 - s2)^2.
    assert features.frechet_distance(clip, strong) == pytest.approx(features.frechet_distance(strong, clip), rel=1e-6)


def test_loop_score_ranks_clips_made_to_fail():
    clips = {
        "moving": moving(),
        "half frozen": half_frozen(),
        "looping": looping(),
        "frozen": frozen(),
    }
    found = {name: quality.loop_score(clip) for name, clip in clips.items()}
    score = {name: float(result.score) for name, result in found.items()}
    assert score["moving"] > 90
    assert 15 < score["half frozen"] < 60
    assert 15 < score["looping"] < 40
    assert score["frozen"] == pytest.approx(0.0, abs=1e-6)
    assert int(found["looping"].lag) == 8
    assert float(found["looping"].repetition) == pytest.approx(1.0)
    assert float(found["looping"].periodicity) == pytest.approx(1.0)
    assert float(found["half frozen"].stillness) == pytest.approx(16 / 31)


def test_loop_score_sees_through_noise_and_is_no_flicker_metric():
    assert float(quality.loop_score(noisy(looping(), 0.02)).score) < 60 < float(quality.loop_score(moving()).score)
    assert float(quality.loop_score(noise()).score) > 85  # never repeats; flicker() is what tells it
    bright = moving() * torch.tensor([1.0, 0.8]).repeat(16)[None, :, None, None, None]
    flickers = [float(metrics.flicker(clip)) for clip in (moving(), noisy(moving(), 0.1), noise(), bright)]
    assert flickers[0] < 0.5 < flickers[1] < flickers[2] < 3.5
    assert flickers[3] > 3


def test_masked_attention_is_the_op_and_the_reference():
    q, k, v = torch.randn(3, 2, 3, 40, 8)
    mask = torch.rand(1, 3, 5, 5) < 0.5
    mask[..., 0] = True
    plan = drad.BlockPlan.from_mask(mask, block_q=8, block_kv=8, q_len=40, kv_len=40)
    for weight in (0.0, 0.7):
        expected, _ = block_sparse_attention_reference(
            q, k, v, plan.kv_counts, plan.kv_indices, None, 8, 8, None, torch.tensor([weight]) if weight else None
        )
        assert relative_error(blocks.masked_attention(q, k, v, mask, 8, weight), expected) < 1e-6


def test_second_order_is_the_sum_over_blocks_written_out():
    """Ragged tail, rows that drop nothing and rows that drop all, against loops over queries and blocks."""
    q, k, v = torch.randn(3, 1, 2, 21, 4, dtype=torch.float64)
    mask = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0, :], mask[..., 1, :] = True, False
    parts, scale = [slice(0, 8), slice(8, 16), slice(16, 21)], 0.7
    mass, shift = blocks.second_order(q, k, v, mask, 8, scale)
    for h in range(2):
        means = [k[0, h, part].mean(0) for part in parts]
        for row, part in enumerate(parts):
            dropped = [b for b in range(3) if not mask[0, 0, row, b]]
            logits = [scale * q[0, h, part].mean(0) @ means[b] + math.log(len(k[0, h, parts[b]])) for b in dropped]
            weights = torch.stack(logits).softmax(0) if dropped else []
            variance, both = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
            for b, weight in zip(dropped, weights, strict=True):
                dk, dv = (x[0, h, parts[b]] - x[0, h, parts[b]].mean(0) for x in (k, v))
                variance, both = variance + weight * dk.square().mean(0), both + weight * dv.T @ dk / len(dk)
            for i in range(part.start, part.stop):
                u = scale**2 / 2 * q[0, h, i].square() @ variance
                torch.testing.assert_close(mass[0, h, i, 0], u)
                torch.testing.assert_close(shift[0, h, i], scale * both @ q[0, h, i] / (1 + u))


def test_covariances_leave_an_error_of_second_order():
    """All blocks dropped, short queries: means alone err by O(q), with covariances by O(q^2). What is kept is exact."""
    q, k, v = torch.randn(3, 1, 2, 64, 8, dtype=torch.float64)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    errors = {}
    for size in (1e-2, 1e-3):
        dense = torch.nn.functional.scaled_dot_product_attention(size * q, k, v)
        for covariance in (False, True):
            got = blocks.masked_attention(size * q, k, v, nothing, 16, 1.0, covariance=covariance)
            errors[size, covariance] = (got - dense).abs().max()
    assert 8 < errors[1e-2, False] / errors[1e-3, False] < 12
    assert 80 < errors[1e-2, True] / errors[1e-3, True] < 120
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    got = blocks.masked_attention(q, k, v, ~nothing, 16, 1.0, covariance=True)
    torch.testing.assert_close(got, dense)


def test_block_mass_of_a_ragged_tail_sums_to_one():
    q, k = torch.randn(2, 1, 2, 21, 4)
    mass = blocks.block_mass(q, k, 8)
    assert mass.shape == (1, 2, 3, 3)
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2, 3))
    share = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(mass[0, 1, 2, 1], share[0, 1, 16:, 8:16].sum(-1).mean())


def test_masks_spend_their_budget():
    q, k = torch.randn(2, 1, 2, 128, 4)
    mass = blocks.block_mass(q, k, 16)
    budget = blocks.block_budget(8, 0.75, 16, 0.0)
    best, drawn = blocks.oracle_mask(mass, budget), blocks.random_mask((1, 2, 8, 8), budget, seed=1)
    for mask in (best, drawn):
        assert (mask.sum((-1, -2)) == budget).all()
        assert mask.any(-1).all()
        assert blocks.skipped(mask, 16, 0.0) == pytest.approx(0.75)
    assert (drawn.diagonal(0, -2, -1)).all()
    assert (mass * best).sum() > (mass * drawn).sum()
    paid = blocks.block_budget(8, 0.75, 16, 1.0)
    assert blocks.skipped(blocks.oracle_mask(mass, paid), 16, 1.0) == pytest.approx(0.75)


def run(subject, method):
    with torch.no_grad(), method.run(subject) as opened:
        return subject.generate(opened.model, ["a"], [3]), opened.sparsity()


def test_hook_equals_the_compiled_model():
    subject = tiny()
    for weight in (0.0, 1.0):
        plan = drad.make_plan("dynamicrad", GRID, 16, sparsity=0.5, compensate=weight)
        hooked, skipped = run(subject, methods.Hooked("x", 0.5, methods.fixed(plan.block_mask()), 16, weight))
        compiled, reported = run(
            subject, quality.method("static_ratio", subject, 0.5, 16, profile=PLAIN, compensate=weight)
        )
        torch.testing.assert_close(hooked, compiled, atol=1e-5, rtol=0)
        assert skipped == pytest.approx(reported) == pytest.approx(plan.sparsity)


def test_hook_equals_the_compiled_model_where_it_chooses_blocks():
    subject = tiny()
    options = {"profile": PLAIN, "regime": "mid", "compensate": 1.0, "rank": "mass"}
    compiled, reported = run(subject, quality.method("dynamic_threshold", subject, 0.5, 16, **options))
    candidates = make_candidates(GRID, 16, sparsity=0.0, compensate=1.0)
    near, far = ratios_for(candidates, 0.5)
    method = methods.Hooked("x", 0.5, methods.selected(candidates, near, far), 16, 1.0)
    hooked, skipped = run(subject, method)
    torch.testing.assert_close(hooked, compiled, atol=1e-5, rtol=0)
    assert skipped == pytest.approx(reported)


def test_hook_counts_sites_and_steps_and_keeping_all_changes_nothing():
    subject, seen = tiny(), []

    def choose(place, q, k, scale):
        seen.append(place)
        return torch.ones(1, 1, 6, 6, dtype=torch.bool)

    kept, skipped = run(subject, methods.Hooked("all", 0.0, choose, 16))
    torch.testing.assert_close(kept, run(subject, quality.Dense())[0], atol=1e-6, rtol=0)
    assert skipped == 0.0
    assert [(place.step, place.site) for place in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    first = methods.dense_at_first(choose, steps=1, layers=1)
    places = [quality.Place(site, step, 0) for step in (0, 1) for site in (0, 1)]
    assert [first(place, None, None, None) is None for place in places] == [True, True, True, False]


def test_hook_refuses_what_it_does_not_know():
    subject = tiny()
    with (
        pytest.raises(DynamicRadError, match="is the token grid right"),
        quality.attention_hook(subject.model, 77, lambda *_: None),
    ):
        subject.generate(subject.model, ["a"], [0])
    with pytest.raises(DynamicRadError, match="Did you mean 'oracle'"):
        quality.method("oracel", subject, 0.5, 16)


def test_radial_is_the_nearest_mask():
    subject = tiny()
    for wanted in (0.2, 0.6):
        mask, params = methods.radial_near(subject, wanted, 16)
        plan = drad.make_plan("radial", GRID, 16, **params)
        assert bool((plan.block_mask() == mask).all())
        published = drad.make_plan("radial", GRID, 16)
        assert abs(plan.sparsity - wanted) <= abs(published.sparsity - wanted)


def test_harness_measures_all_methods_writes_pictures_and_resumes(tmp_path, monkeypatch):
    subject = tiny()
    chosen = [quality.method(name, subject, 0.5, 16, profile=PLAIN) for name in quality.METHODS]
    results = quality.evaluate(subject, chosen, ["a", "b"], tmp_path, batch=2, real=6, progress=False)
    rows = {row.method: row for row in results.rows}
    assert list(rows) == ["real", *quality.METHODS]
    assert rows["dense"].psnr == metrics.MAX_PSNR
    assert rows["dense"].frechet_dense == pytest.approx(0.0, abs=1e-6)
    assert rows["oracle"].sparsity == pytest.approx(0.5, abs=0.02)
    assert rows["static_ratio"].sparsity == pytest.approx(0.5, abs=0.02)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"][0]["psnr"] is None  # real clips have no dense ones
    assert len(saved["seeds"]) == 2
    quality.save_pareto(results, tmp_path / "pareto.png")
    shown = {name: clip[:2] for name, clip in results.clips.items()}
    quality.save_gif(shown, tmp_path / "clips.gif", titles=["a", "b"], scale=2)
    assert read_clip(tmp_path / "clips.gif").shape[1] == 6

    def fails(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(subject, "generate", fails)
    again = quality.evaluate(subject, chosen, ["a", "b"], tmp_path, batch=2, real=6, progress=False)
    got, want = again.to_json(), results.to_json()
    for mine, other in zip(got.pop("rows"), want.pop("rows"), strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():  # sums over the same clips at other addresses
            assert mine[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    assert got == want


def test_errors_are_clear(tmp_path):
    with pytest.raises(DynamicRadError, match=r"N, F, C, H, W"):
        metrics.psnr(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))
    with pytest.raises(DynamicRadError, match="not finite"):
        metrics.motion(torch.full((1, 3, 3, 8, 8), math.nan))
    with pytest.raises(DynamicRadError, match="at least 8 frames"):
        quality.loop_score(moving(4))
    with pytest.raises(DynamicRadError, match="module:function"):
        load_subject("nowhere")
    with pytest.raises(DynamicRadError, match="no subject at"):
        load_subject("nowhere.at.all:subject")
    (tmp_path / "x.gif").write_text("no picture")
    with pytest.raises(DynamicRadError, match="not a picture"):
        read_clip(tmp_path / "x.gif")


def test_command_scores_animations(tmp_path, capsys):
    from dynamicrad_compile.cli import main

    quality.save_gif({"x": looping()}, tmp_path / "loop.gif", scale=2)
    assert main(["eval", "--clips", str(tmp_path / "loop.gif")]) == 0
    score = float(capsys.readouterr().out.splitlines()[1].split()[0])
    assert score < 40
    assert np.isfinite(score)
