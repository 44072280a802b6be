"""Pattern lvsa compiled: the blocks of each step, chosen by the clock among those of a cycle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import compile_sparse, drad, first_output, make, masked_dense, relative_error
from support.marks import INNER
from support.tiny_dit import LATENTS, TinyDiT

from dynamicrad_compile.plans.patterns.lvsa import key_frame_interval
from dynamicrad_compile.profiles.parameters import LVSA

LONG = LVSA(reference_frames=5, window=1)
OPTIONS = dict(pattern="lvsa", reference_frames=5, window=1, block_size=16, min_tokens=0)


def call(compiled, inputs, timestep):
    with torch.no_grad():
        return first_output(compiled(**{**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}))


@pytest.mark.parametrize("rule", ["published", "exact"])
@pytest.mark.parametrize("inner", INNER)
def test_each_step_reads_its_own_frames(rule, inner):
    torch.manual_seed(0)
    model, inputs, _ = make("wan_t2v", f=9)
    compiled = compile_sparse(model, **OPTIONS, rule=rule, inner=inner)
    call(compiled, inputs, 1000.0)
    grid = drad.report(compiled).replaced[0].grid
    number = key_frame_interval(grid[0], LONG.model_copy(update={"rule": rule}))
    assert number > 2
    plans = [drad.make_plan("lvsa", grid, 16, reference_frames=5, window=1, rule=rule, step=s) for s in range(number)]
    steps = [*range(number + 2)] * 2
    shares = []
    for n, step in enumerate(steps[1:], 1):
        timestep = 1000.0 - 10 * step
        plan = plans[step % number]
        with masked_dense(plan):
            expected = call(model, inputs, timestep)
        for _ in range(2):
            assert relative_error(call(compiled, inputs, timestep), expected) < 1e-5, n
        shares += [plan.sparsity] * 2
    report = drad.report(compiled)
    assert len(report.graphs) == 1
    executed = (sum(shares) + plans[0].sparsity) / (len(shares) + 1)
    assert report.replaced[0].sparsity == pytest.approx(executed, abs=1e-9)


def test_another_length_is_another_cycle():
    torch.manual_seed(0)
    model = make("wan_t2v", f=9)[0]
    compiled = torch.compile(model, backend="dynamicrad", dynamic=True, options={**OPTIONS, "inner": "eager"})
    for frames in (9, 7, 12):
        inputs = make("wan_t2v", f=frames)[1]
        for step in range(3):
            timestep = 1000.0 - 10 * step
            plan = drad.make_plan("lvsa", (frames, 6, 8), 16, reference_frames=5, window=1, step=step)
            with masked_dense(plan):
                expected = call(model, inputs, timestep)
            assert relative_error(call(compiled, inputs, timestep), expected) < 1e-5, (frames, step)


def test_text_is_read_by_all_and_blocks_suit_the_frames():
    torch.manual_seed(0)
    model, inputs, _ = make("hunyuan_video", f=9)
    options = {**OPTIONS, "block_size": None, "inner": "eager"}
    compiled = compile_sparse(model, **options)
    call(compiled, inputs, 500.0)
    site = drad.report(compiled).replaced[0]
    plan = drad.make_plan("lvsa", site.grid, site.plan.block_q, *site.text_tokens, reference_frames=5, window=1)
    with masked_dense(plan):
        expected = call(model, inputs, 500.0)
    assert relative_error(call(compiled, inputs, 500.0), expected) < 1e-5
    assert plan.block_mask()[0, 0].sum(-1).max() == plan.num_kv_blocks
    assert f"pattern 'lvsa' has blocks of {plan.block_q} tokens" in " ".join(drad.report(compiled).notes)


def test_without_a_clock_the_first_step_stands_for_all():
    model = TinyDiT(F.scaled_dot_product_attention)
    report = drad.explain(model, LATENTS, options={**OPTIONS, "reference_frames": 2, "window": 0, "inner": "eager"})
    assert any("first step at every step: no timestep" in note for note in report.notes)


def test_options_without_meaning_are_said():
    model, inputs, _ = make("wan_t2v")
    compiled = compile_sparse(model, block_size=16, min_tokens=0, inner="eager", window=2, rule="exact")
    call(compiled, inputs, 1.0)
    assert "pattern 'dynamicrad' has no meaning for window, rule: not used" in drad.report(compiled).notes
