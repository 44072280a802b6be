"""Pattern adaspa compiled, against the same search written out in plain PyTorch around dense attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import compile_sparse, drad, first_output, make, relative_error
from support.marks import INNER
from support.searching import BLOCK, STEPS, Searching
from support.tiny_dit import LATENTS, TinyDiT

from dynamicrad_compile.errors import OptionsError, PlanError

OPTIONS = dict(pattern="adaspa", sparsity=0.6, search_steps=STEPS, block_size=BLOCK, min_tokens=0)
TIMESTEPS = (1000.0, 900.0, 700.0, 500.0, 300.0, 100.0)


def call(compiled, inputs, timestep):
    with torch.no_grad():
        return first_output(compiled(**{**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}))


@pytest.mark.parametrize(("name", "batch"), [("wan_t2v", 1), ("wan_t2v", 2), ("hunyuan_video", 1)])
@pytest.mark.parametrize("inner", INNER)
def test_steps_read_what_searches_found(name, batch, inner):
    torch.manual_seed(0)
    model, inputs, _ = make(name, batch=batch)
    compiled = compile_sparse(model, **OPTIONS, inner=inner)
    call(compiled, inputs, TIMESTEPS[0])
    site = drad.report(compiled).replaced[0]
    reference = Searching(site.shape[2], site.text_tokens)
    calls = 0
    for _ in range(2):
        for reference.step, timestep in enumerate(TIMESTEPS):
            for reference.fresh in (True, False):
                reference.layer, calls = 0, calls + 1
                with reference:
                    expected = call(model, inputs, timestep)
                assert relative_error(call(compiled, inputs, timestep), expected) < 1e-5, reference.step
    report = drad.report(compiled)
    assert len(report.graphs) == 1
    kept = (sum(reference.kept) / reference.layer + 1.0) / (calls + 1)
    searches = 0.5 * 4 / (calls + 1)
    assert sum(site.sparsity for site in report.replaced) / len(report.replaced) == pytest.approx(1 - kept - searches)
    for number, site in enumerate(report.replaced):
        found = torch.stack(reference.recall[number]).mean((0, 1))
        assert torch.tensor(site.recall) == pytest.approx(found, abs=1e-4)
        assert site.search_share == pytest.approx(searches)
    assert "searches cost" in report.summary()


def test_boxes_error_and_covariances():
    torch.manual_seed(0)
    model, inputs, _ = make("wan_t2v")
    more = dict(box=(4, 2, 2), rank="error", compensate=1.0, covariance=True, recall_threshold=0.5)
    errors = {}
    for name, options in (("plain", {}), ("ours", more)):
        compiled = compile_sparse(model, **{**OPTIONS, **options}, inner="eager")
        for timestep in TIMESTEPS:
            errors[name] = relative_error(call(compiled, inputs, timestep), call(model, inputs, timestep))
    assert errors["ours"] < errors["plain"]


@pytest.mark.parametrize("options", [{}, dict(pattern=None, mode="dynamic_threshold", refresh_steps=4)], ids=str)
def test_another_batch_has_a_state_of_its_own(options):
    torch.manual_seed(0)
    model = make("wan_t2v")[0]
    given = {**OPTIONS, "search_steps": (0,), **options, "inner": "eager"}
    compiled = torch.compile(model, backend="dynamicrad", options=given)
    for batch in (1, 2, 3, 2):
        inputs = make("wan_t2v", batch=batch)[1]
        for timestep in TIMESTEPS[:2]:
            error = relative_error(call(compiled, inputs, timestep), call(model, inputs, timestep))
        assert 1e-4 < error < 0.2, batch
    assert all(site.replaced for site in drad.report(compiled).sites if site.role == "video_self_attention")


def test_what_can_not_be_searched_stays_dense():
    tiny = TinyDiT(F.scaled_dot_product_attention)
    (site,) = drad.explain(tiny, LATENTS, options={**OPTIONS, "inner": "eager"}).sites
    assert (site.replaced, site.code) == (False, "no_search")
    model, inputs, _ = make("wan_t2v")
    compiled = compile_sparse(model, **OPTIONS, inner="aot_eager")
    first_output(compiled(**{**inputs, "hidden_states": inputs["hidden_states"].requires_grad_()})).sum().backward()
    sites = [site for site in drad.report(compiled).sites if site.role == "video_self_attention"]
    assert {site.code for site in sites} == {"search_in_training"}


def test_another_resolution_is_searched_for_itself():
    torch.manual_seed(0)
    model = make("wan_t2v")[0]
    compiled = torch.compile(model, backend="dynamicrad", options={**OPTIONS, "inner": "eager"})
    for sizes in (dict(f=5), dict(f=7), dict(f=5)):
        inputs = make("wan_t2v", **sizes)[1]
        for timestep in TIMESTEPS[:2]:
            assert relative_error(call(compiled, inputs, timestep), call(model, inputs, timestep)) < 1e-5
        assert relative_error(call(compiled, inputs, TIMESTEPS[2]), call(model, inputs, TIMESTEPS[2])) > 1e-3


@pytest.mark.parametrize("steps", [(), (3, 1), (1, 1), (-1,), (1.5,), "10", (True,)])
def test_wrong_steps_are_refused(steps):
    with pytest.raises(OptionsError, match=r"option search_steps = .*expected numbers of steps"):
        drad.Options(search_steps=steps)


def test_all_that_can_be_skipped_is():
    torch.manual_seed(0)
    model, inputs, _ = make("wan_t2v")
    compiled = compile_sparse(model, **{**OPTIONS, "sparsity": 1.0}, inner="eager")
    for timestep in TIMESTEPS:
        assert call(compiled, inputs, timestep).isfinite().all()


def test_a_grid_alone_gives_no_plan():
    with pytest.raises(PlanError, match="by the queries and keys of a run"):
        drad.make_plan("adaspa", (4, 6, 8))
