"""Regimes, dense steps and chosen blocks inside a compiled model: right, on the device, never compiled again."""

from __future__ import annotations

import pytest
import torch
from support.conditioned import NoTime
from support.graphs import compile_sparse, first_output, make, relative_error
from support.marks import INNER, slow
from support.plain import PLAIN

import dynamicrad_compile as drad
from dynamicrad_compile.kernels import select_cpu
from dynamicrad_compile.runtime.regimes import MAX_BATCH
from dynamicrad_compile.runtime.router import Router

REGIMES = ("low", "mid", "high")
LOW, MID, HIGH = range(3)
STEPS = (900.0, 700.0, 500.0, 300.0)


@pytest.fixture(scope="module")
def wan():
    return make("wan_t2v")[:2]


@pytest.fixture(scope="module")
def prompts():
    """[3, 7, 16]: one prompt for each regime of `router`."""
    return 3 * _directions()[:, None].expand(3, 7, 16).contiguous()


@pytest.fixture(scope="module")
def router():
    return Router(_directions(), torch.zeros(3))


def _directions():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    return weight - weight.mean(0)


def run(model, kwargs, **changes):
    with torch.no_grad():
        return first_output(model(**{**kwargs, **changes}))


def sparse(model, **options):
    return compile_sparse(model, **{"block_size": 16, "inner": "aot_eager", **options})


def at(kwargs, timestep):
    return torch.full_like(kwargs["timestep"], timestep)


def graphs(compiled):
    return len(drad.report(compiled).graphs)


def fixed(model, kwargs, regime, prompt, **options):
    """The output in one regime, from graphs that nothing but our passes touches."""
    options = {"inner": "eager", **options}
    return run(sparse(model, regime=regime, **options), kwargs, encoder_hidden_states=prompt)


MODES = [
    dict(compensate=0.5),
    slow(dict(block_size=32, mode="dynamic_threshold")),
    slow(dict()),
    slow(dict(mode="dynamic_threshold")),
]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_each_row_of_a_batch_gets_the_regime_of_its_own_prompt(wan, router, prompts, options):
    model, kwargs = wan
    batch = {name: kwargs[name].repeat_interleave(3, 0) for name in ("hidden_states", "timestep")}
    compiled = sparse(model, router=router, **options)
    out = run(compiled, kwargs, **batch, encoder_hidden_states=prompts)
    alone = [sparse(model, regime=regime, **{"inner": "eager", **options}) for regime in REGIMES]
    for row, one in enumerate(alone):
        expected = run(one, kwargs, encoder_hidden_states=prompts[row : row + 1])
        assert relative_error(out[row : row + 1], expected) < 1e-5
    high = run(alone[HIGH], kwargs, encoder_hidden_states=prompts[:1])
    assert options.get("mode") or relative_error(out[:1], high) > 1e-4  # few blocks: the same may be chosen


PROFILE = """
schema = 1
[profile]
name = "mixed"
mode = "dynamic_threshold"
block_size = 16
[regimes.low]
static_ratio = { sparsity = 0.8 }
dynamic_threshold = { sparsity = 0.4, criterion = "ratio", near = 0.3, far = 0.1 }
[regimes.mid]
static_ratio = { sparsity = 0.8 }
dynamic_threshold = { sparsity = 0.4, criterion = "threshold", near = 0.0, far = 0.0, compensate = 0.5 }
[regimes.high]
static_ratio = { sparsity = 0.8 }
dynamic_threshold = { sparsity = 0.4, criterion = "mass", rank = "error", near = 0.9, far = 0.5 }
"""


@pytest.mark.parametrize("inner", INNER)
def test_regimes_with_criteria_of_their_own(wan, router, prompts, tmp_path, inner):
    model, kwargs = wan
    profile = tmp_path / "mixed.toml"
    profile.write_text(PROFILE)
    options = dict(profile=str(profile), inner=inner)
    batch = {name: kwargs[name].repeat_interleave(3, 0) for name in ("hidden_states", "timestep")}
    compiled = sparse(model, router=router, refresh_steps=2, **options)
    out = run(compiled, kwargs, **batch, encoder_hidden_states=prompts)
    for row, regime in enumerate(REGIMES):
        alone = fixed(model, kwargs, regime, prompts[row : row + 1], profile=str(profile))
        assert relative_error(out[row : row + 1], alone) < 1e-5
    assert "the regimes choose by different criteria" in str(drad.report(compiled))


@pytest.mark.parametrize("inner", INNER)
def test_a_new_prompt_changes_the_regime_without_compiling(wan, router, prompts, inner):
    model, kwargs = wan
    compiled = sparse(model, router=router, inner=inner)
    last = dict(timestep=at(kwargs, STEPS[-1]))
    expected = [fixed(model, {**kwargs, **last}, name, prompts[r : r + 1]) for r, name in enumerate(REGIMES)]
    for regime in (HIGH, LOW, MID, LOW):
        for timestep in STEPS:  # the next generation starts where timesteps jump back
            out = run(compiled, kwargs, timestep=at(kwargs, timestep), encoder_hidden_states=prompts[regime][None])
        assert relative_error(out, expected[regime]) < 1e-5
    assert graphs(compiled) == 1
    assert len({round(float(e.norm()), 4) for e in expected}) == 3


def test_the_negative_prompt_gets_the_regime_of_the_prompt(wan, router, prompts):
    model, kwargs = wan
    compiled = sparse(model, router=router)
    high = sparse(model, regime="high", inner="eager")
    for timestep in STEPS:
        run(compiled, kwargs, timestep=at(kwargs, timestep), encoder_hidden_states=prompts[HIGH][None])
        negative = dict(timestep=at(kwargs, timestep), encoder_hidden_states=prompts[LOW][None])
        assert relative_error(run(compiled, kwargs, **negative), run(high, kwargs, **negative)) < 1e-5
    assert graphs(compiled) == 1


def test_sparsity_reported_is_the_sparsity_executed(wan, router, prompts):
    model, kwargs = wan
    compiled = sparse(model, router=router)
    planned = [drad.make_plan("dynamicrad", (5, 6, 8), 16, regime=r, profile=PLAIN).sparsity for r in REGIMES]
    for timestep in (900.0, 800.0):
        run(compiled, kwargs, timestep=at(kwargs, timestep), encoder_hidden_states=prompts[LOW][None])
    assert drad.report(compiled).replaced[0].sparsity == pytest.approx(planned[LOW])
    run(compiled, kwargs, timestep=at(kwargs, 850.0), encoder_hidden_states=prompts[HIGH][None])
    mean = (2 * planned[LOW] + planned[HIGH]) / 3
    assert drad.report(compiled).replaced[0].sparsity == pytest.approx(mean)


@pytest.mark.parametrize("options", [dict(), dict(mode="dynamic_threshold"), dict(compensate=1.0)], ids=str)
def test_the_first_steps_are_dense(wan, options):
    model, kwargs = wan
    compiled = sparse(model, sparsity=0.6, dense_steps=2, **options)
    for _ in range(2):
        for step, timestep in enumerate(STEPS):
            for _ in range(2):  # both calls of classifier-free guidance
                changes = dict(timestep=at(kwargs, timestep))
                error = relative_error(run(compiled, kwargs, **changes), run(model, kwargs, **changes))
                assert (error < 1e-5) == (step < 2), (step, error)
    assert graphs(compiled) == 1
    assert drad.report(compiled).replaced[0].sparsity == pytest.approx(0.3, abs=0.03)


def test_the_noisy_side_of_a_timestep_is_dense(wan):
    model, kwargs = wan
    compiled = sparse(model, sparsity=0.6, dense_timestep=600.0)
    for generation in range(2):
        for timestep in STEPS:
            changes = dict(timestep=at(kwargs, timestep))
            error = relative_error(run(compiled, kwargs, **changes), run(model, kwargs, **changes))
            if generation:
                assert (error < 1e-5) == (timestep >= 600)
    assert graphs(compiled) == 1


@pytest.mark.parametrize("refresh_steps", [None, 1])
@pytest.mark.parametrize("rank", ["mass", "error"])
def test_blocks_are_chosen_by_the_rank_of_the_options(wan, rank, refresh_steps, monkeypatch):
    model, kwargs = wan
    ranks, select = [], select_cpu.select
    monkeypatch.setattr(select_cpu, "select", lambda s, *rest: (ranks.append(s.rank), select(s, *rest)))
    options = dict(mode="dynamic_threshold", sparsity=0.6, rank=rank, refresh_steps=refresh_steps)
    compiled = sparse(model, inner="eager", **options)
    run(compiled, kwargs)
    assert ranks == [rank] * len(drad.report(compiled).replaced)


@pytest.mark.parametrize("rank", ["mass", "error"])
@pytest.mark.parametrize("inner", INNER)
def test_chosen_blocks_are_kept_between_refreshes(wan, inner, rank):
    model, kwargs = wan
    options = dict(mode="dynamic_threshold", sparsity=0.6, inner=inner, rank=rank)
    keeping = sparse(model, refresh_steps=2, **options)
    choosing = sparse(model, **options)
    generator = torch.Generator().manual_seed(3)
    for step, timestep in enumerate(STEPS):
        latents = torch.randn(kwargs["hidden_states"].shape, generator=generator)
        changes = dict(timestep=at(kwargs, timestep), hidden_states=latents)
        error = relative_error(run(keeping, kwargs, **changes), run(choosing, kwargs, **changes))
        assert (error < 1e-5) == (step % 2 == 0), (step, error)
    assert graphs(keeping) == 1
    assert drad.report(keeping).replaced[0].sparsity == pytest.approx(0.6, abs=0.05)


def test_dynamic_mode_meets_the_sparsity_that_is_asked_for(wan):
    model, kwargs = wan
    for sparsity in (0.3, 0.7):
        compiled = sparse(model, mode="dynamic_threshold", sparsity=sparsity, inner="eager")
        run(compiled, kwargs)
        assert drad.report(compiled).replaced[0].sparsity == pytest.approx(sparsity, abs=0.05)
    compiled = sparse(model, mode="dynamic_threshold", sparsity=0.0, inner="eager")
    assert relative_error(run(compiled, kwargs), run(model, kwargs)) < 1e-5


@pytest.mark.parametrize("options", [dict(), dict(mode="dynamic_threshold"), dict(dense_steps=1)], ids=str)
@pytest.mark.slow
def test_symbolic_sizes(wan, router, prompts, options):
    model, kwargs = wan
    compiled = sparse(model, router=router, **options)
    for step, frames in enumerate((5, 7)):
        latents = torch.randn(1, 4, frames, 12, 16)
        torch._dynamo.mark_dynamic(latents, 2)
        changes = dict(
            hidden_states=latents, encoder_hidden_states=prompts[HIGH][None], timestep=at(kwargs, STEPS[step])
        )
        if options.get("dense_steps") and step == 0:
            alone = model
        else:
            alone = sparse(model, regime="high", inner="eager", **{k: v for k, v in options.items() if k == "mode"})
        assert relative_error(run(compiled, kwargs, **changes), run(alone, kwargs, **changes)) < 1e-5
    assert graphs(compiled) == 1


def test_wishes_that_cannot_be_met_are_said(wan, router, prompts):
    model, kwargs = wan
    wide = Router(torch.randn(3, 20), torch.zeros(3))
    compiled = sparse(model, router=wide, refresh_steps=2)
    run(compiled, kwargs)
    text = str(drad.report(compiled))
    assert "the router is for embeddings of 20 features, the prompt has 16" in text
    assert "refresh_steps = 2 has no meaning: mode is not dynamic_threshold" in text
    with pytest.raises(Exception, match="strict=True, and regime 'auto' is 'high'"):
        run(sparse(model, router=wide, strict=True), kwargs)


def test_no_timestep_no_gate():
    compiled = sparse(NoTime(), dense_steps=2, min_tokens=0)
    with torch.no_grad():
        compiled(torch.randn(1, 3, 4, 6, 10), torch.randn(1, 7, 8))
    assert "dense_steps = 2 can't be honoured: no timestep among the inputs" in str(drad.report(compiled))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(compensate=1.5), "compensate = 1.5"),
        (dict(refresh_steps=0), "refresh_steps = 0"),
        (dict(dense_timestep=float("nan")), "dense_timestep = nan"),
        (dict(router=3), "router = 3: expected a path, or a Router"),
        (dict(mode="dynamic"), "mode = 'dynamic'"),
    ],
    ids=str,
)
def test_bad_options(options, match):
    with pytest.raises(drad.OptionsError, match=match):
        drad.Options(**options)


def test_a_router_that_is_not_there(wan):
    model, kwargs = wan
    with pytest.raises(Exception, match="no-such-router"):
        run(sparse(model, router="no-such-router.safetensors"), kwargs)


def broken(wan):
    """The model with a graph break in front of each block, so that attention sees neither timestep nor prompt."""
    model, kwargs = wan
    model = make("wan_t2v")[0]
    for block in model.blocks:
        block.register_forward_pre_hook(_breaks)
    return model, kwargs


def _breaks(module, args):
    torch._dynamo.graph_break()


def test_state_crosses_graph_breaks(wan, router, prompts):
    model, kwargs = broken(wan)
    options = dict(block_size=16, inner="aot_eager", min_tokens=0, grid=(5, 6, 8))
    compiled = drad.compile(model, router=router, dense_steps=1, **options)
    alone = {r: drad.compile(model, regime=REGIMES[r], **{**options, "inner": "eager"}) for r in (HIGH, LOW)}
    for generation, regime in ((0, HIGH), (1, LOW)):
        for step, timestep in enumerate(STEPS):
            for prompt in (prompts[regime][None], prompts[MID][None]):  # the negative prompt second
                changes = dict(timestep=at(kwargs, timestep), encoder_hidden_states=prompt)
                reference = model if step == 0 else alone[regime]
                error = relative_error(run(compiled, kwargs, **changes), run(reference, kwargs, **changes))
                assert error < 1e-5, (generation, step, error)
            if step == 1:
                break
    assert len(drad.report(compiled).replaced) == 1  # one graph serves both blocks


def test_each_layer_keeps_its_own_blocks_where_one_graph_serves_several(wan):
    model, kwargs = broken(wan)
    options = dict(block_size=16, min_tokens=0, grid=(5, 6, 8), mode="dynamic_threshold", sparsity=0.6)
    keeping = drad.compile(model, refresh_steps=2, inner="aot_eager", **options)
    choosing = drad.compile(model, inner="eager", **options)
    generator = torch.Generator().manual_seed(3)
    for step, timestep in enumerate(STEPS):
        latents = torch.randn(kwargs["hidden_states"].shape, generator=generator)
        changes = dict(timestep=at(kwargs, timestep), hidden_states=latents)
        error = relative_error(run(keeping, kwargs, **changes), run(choosing, kwargs, **changes))
        assert (error < 1e-5) == (step % 2 == 0), (step, error)
    assert len(drad.report(keeping).replaced) == 1


def test_radial_says_what_it_does_not_use(wan, router):
    model, kwargs = wan
    compiled = sparse(model, pattern="radial", router=router, sparsity=0.5)
    run(compiled, kwargs)
    assert "pattern 'radial' has no meaning for router, sparsity: not used" in str(drad.report(compiled))


def test_more_prompts_than_can_be_remembered(wan, router, prompts):
    model, kwargs = wan
    many = MAX_BATCH + 1
    batch = {name: kwargs[name].repeat_interleave(many, 0) for name in ("hidden_states", "timestep")}
    compiled = sparse(model, router=router)
    out = run(compiled, kwargs, **batch, encoder_hidden_states=prompts[LOW][None].repeat(many, 1, 1))
    assert relative_error(out[-1:], fixed(model, kwargs, "low", prompts[LOW][None])) < 1e-5
