"""Patterns whose blocks change from step to step, on real diffusers classes: a search's, and the frames of a cycle."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, call, compile_sparse, drad, make, masked_dense, relative_error
from support.marks import fast
from support.searching import BLOCK, STEPS, Searching
from zoo.models import _GEN, ZOO

NONE = {"latte", "sana_video", "neg_flux", "neg_temporal"}  # no attention over a whole video
UNKNOWN = {"hunyuan_video15", "mochi", "mochi_b2"}  # lengths that depend on data
CASES = fast(sorted(ZOO.keys() - NONE - UNKNOWN), {"wan_i2v", "cogvideox_5b", "ltx"})
TIMES = (1000.0, 900.0, 700.0, 500.0, 300.0)
SEARCH = dict(pattern="adaspa", sparsity=0.6, search_steps=STEPS, block_size=BLOCK)
CYCLE = dict(reference_frames=2, window=0)


def at(inputs, timestep):
    return {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}


@pytest.fixture(autouse=True)
def same_inputs():
    """Whatever ran before: of two blocks that hold equal shares but for rounding, either may be the better one."""
    torch.manual_seed(0)
    _GEN.manual_seed(0)


@pytest.mark.parametrize("name", CASES)
def test_searched_blocks(name):
    model, inputs, expected = make(name)
    compiled = compile_sparse(model, **SEARCH)
    call(compiled, at(inputs, TIMES[0]))
    report = drad.report(compiled)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    site = report.replaced[0]
    reference = Searching(site.shape[2], tuple(site.text_tokens))
    for reference.step, timestep in enumerate(TIMES):
        reference.layer = 0
        with reference:
            wanted = call(model, at(inputs, timestep))
        found = call(compiled, at(inputs, timestep)) if reference.step else wanted
        assert relative_error(found, wanted) < 1e-5, reference.step
    assert all(0 < recall <= 1 for recall in drad.report(compiled).replaced[0].recall)


@pytest.mark.parametrize("name", CASES)
def test_frames_of_a_cycle(name):
    model, inputs, expected = make(name)
    compiled = compile_sparse(model, pattern="lvsa", **CYCLE)
    call(compiled, at(inputs, TIMES[0]))
    report = drad.report(compiled)
    assert len(report.replaced) == expected["n_video_self_attn_nodes"]
    site = report.replaced[0]
    assert site.sparsity > 0
    for step, timestep in enumerate(TIMES[1:3], 1):
        with masked_dense(drad.make_plan("lvsa", site.grid, 16, *site.text_tokens, **CYCLE, step=step)):
            wanted = call(model, at(inputs, timestep))
        assert relative_error(call(compiled, at(inputs, timestep)), wanted) < 1e-5, step


@pytest.mark.parametrize("name", fast(sorted(UNKNOWN), {"mochi"}))
@pytest.mark.parametrize("options", [SEARCH, {"pattern": "lvsa", **CYCLE}], ids=["adaspa", "lvsa"])
def test_lengths_that_depend_on_data(name, options):
    """Dense with a reason, but where a graph break hides the timestep: there the first step stands for all."""
    torch.manual_seed(0)
    model, inputs, _ = make(name)
    compiled = torch.compile(model, backend="dynamicrad", options={**OPTIONS, **options})
    out = call(compiled, inputs)
    report = drad.report(compiled)
    codes = {site.code for site in report.sites if site.role == "video_self_attention"}
    if name == "hunyuan_video15":
        assert codes == ({"no_search"} if options is SEARCH else {""})
        assert bool(report.replaced) == (options is not SEARCH)
    else:
        assert codes == {"data_dependent_length"}
    if not report.replaced:
        assert relative_error(out, call(model, inputs)) < 1e-5
