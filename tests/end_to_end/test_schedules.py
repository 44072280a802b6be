"""Schedules of sparsity: each step of a run reads the plan of its stage, from one graph."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.graphs import compile_sparse, drad, first_output, make, relative_error
from support.marks import INNER
from support.plain import PLAIN
from support.tiny_dit import LATENTS, TinyDiT

from dynamicrad_compile.errors import OptionsError
from dynamicrad_compile.runtime.router import Router

TIMESTEPS = (1000.0, 900.0, 700.0, 500.0, 300.0)
SCHEDULE = [(0.0, 0.0), (0.2, 0.4), (0.6, 0.7)]
BY_STEP = (0.0, 0.4, 0.4, 0.7, 0.7)
OPTIONS = dict(block_size=16, inner="eager", regime="mid", min_tokens=0, covariance=False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make("wan_t2v")[0]


@pytest.fixture(scope="module")
def inputs():
    return make("wan_t2v")[1]


def call(compiled, inputs, timestep, **changes):
    with torch.no_grad():
        return first_output(
            compiled(**{**inputs, "timestep": torch.full_like(inputs["timestep"], timestep), **changes})
        )


@pytest.mark.parametrize("mode", ["static_ratio", "dynamic_threshold"])
@pytest.mark.parametrize("inner", INNER)
def test_each_step_has_the_sparsity_of_its_stage(model, inputs, mode, inner):
    options = {**OPTIONS, "mode": mode, "inner": inner}
    compiled = compile_sparse(model, **options, sparsity=SCHEDULE, steps=5)
    constant = {s: compile_sparse(model, **options, sparsity=s) for s in set(BY_STEP)}
    torch._dynamo.utils.counters.clear()
    for generation in range(2):
        for timestep, sparsity in zip(TIMESTEPS, BY_STEP, strict=True):
            for _ in range(2):  # guidance
                out, expected = (call(one, inputs, timestep) for one in (compiled, constant[sparsity]))
                assert relative_error(out, expected) < 1e-6, (generation, timestep)
    report = drad.report(compiled)
    assert len(report.graphs) == 1
    executed = {s: drad.report(one).replaced[0].sparsity for s, one in constant.items()}
    wanted = sum(executed[s] for s in BY_STEP) / len(BY_STEP)
    assert report.replaced[0].sparsity == pytest.approx(wanted, abs=1e-6)
    assert "sparsity changes over a run of 5 steps" in report.notes


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("rising", [False, True])
def test_stages_by_timestep(model, inputs, scale, rising):
    given = [1000.0 - t if rising else t for t in TIMESTEPS]
    starts = [1000.0, 900.0, 500.0]
    schedule = [((1000.0 - t if rising else t) * scale, s) for t, (_, s) in zip(starts, SCHEDULE, strict=True)]
    compiled = compile_sparse(model, **OPTIONS, sparsity=schedule, schedule_by="timestep")
    shares = []
    for t in given:
        call(compiled, inputs, t * scale)
        shares.append(drad.report(compiled).replaced[0].sparsity)
    sums = [0.0, *(n * share for n, share in enumerate(shares, 1))]
    executed = [after - before for before, after in itertools.pairwise(sums)]
    assert executed == pytest.approx(BY_STEP, abs=0.02)


def test_blocks_are_chosen_anew_where_a_stage_begins(model, inputs):
    options = {**OPTIONS, "mode": "dynamic_threshold", "refresh_steps": 4}
    compiled = compile_sparse(model, **options, sparsity=[(0.0, 0.2), (0.2, 0.4), (0.6, 0.7)], steps=5)
    for timestep in TIMESTEPS:
        call(compiled, inputs, timestep)
    assert drad.report(compiled).replaced[0].sparsity == pytest.approx((0.2 + 0.4 * 2 + 0.7 * 2) / 5, abs=0.02)


def test_regimes_have_stages_of_their_own(model, inputs, tmp_path):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    router = Router(weight - weight.mean(0), torch.zeros(3))
    profile, text = tmp_path / "staged.toml", Path(PLAIN).read_text()
    for regime, schedule in (("low", [[0.0, 0.5], [0.5, 0.8]]), ("high", [[0.0, 0.0], [0.25, 0.3]])):
        table = f"[regimes.{regime}.static_ratio]"
        text = text.replace(table, f"[regimes.{regime}]\nschedule = {schedule}\n{table}")
    profile.write_text(text)
    options = dict(block_size=16, inner="eager", min_tokens=0, profile=str(profile), mode="static_ratio")
    compiled = compile_sparse(model, **options, router=router, steps=4)
    by_step = {0: (0.5, 0.5, 0.8, 0.8), 1: (0.8,) * 4, 2: (0.0, 0.3, 0.3, 0.3)}
    names = {0: "low", 1: "mid", 2: "high"}
    for regime, values in by_step.items():
        prompt = 3 * router.weight[regime].expand(1, 7, 16).contiguous()
        for timestep, sparsity in zip((900.0, 700.0, 500.0, 300.0), values, strict=True):
            alone = compile_sparse(model, **options, regime=names[regime], sparsity=sparsity)
            out, expected = (call(one, inputs, timestep, encoder_hidden_states=prompt) for one in (compiled, alone))
            assert relative_error(out, expected) < 1e-6, (regime, timestep)
    assert len(drad.report(compiled).graphs) == 1


def test_without_a_clock_the_mean_is_kept_and_said():
    options = {**OPTIONS, "sparsity": SCHEDULE, "mode": "static_ratio", "compensate": 0.0}
    report = drad.explain(TinyDiT(F.scaled_dot_product_attention), LATENTS, options=options)
    assert any("the schedule's mean at every step" in note for note in report.notes)


@pytest.mark.parametrize(
    ("value", "more", "said"),
    [
        ([(0.2, 0.5)], {}, "from 0.0 up"),
        ([(0.0, 0.5), (0.0, 0.6)], {}, "each later than the one before"),
        ([(0.0, 0.5), (1.0, 0.6)], {}, "below 1.0"),
        ([(0.0, 1.5)], {}, "sparsities in 0..1"),
        ([0.5, 0.6], {}, "pairs (start, sparsity)"),
        ([], {}, "pairs (start, sparsity)"),
        ([(900, 0.5), (950, 0.6), (100, 0.7)], {"schedule_by": "timestep"}, "in the order of a run"),
        ([(0.0, 0.5), (float("nan"), 0.6)], {}, "pairs (start, sparsity)"),
        ("half", {}, "expected a number"),
    ],
)
def test_wrong_schedules_are_refused(value, more, said):
    with pytest.raises(OptionsError, match="option sparsity") as error:
        drad.Options(sparsity=value, **more)
    assert said in str(error.value)
