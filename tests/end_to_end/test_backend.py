"""The backend by name: options, later calls with other shapes, training, strictness, reports."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, call, compile_sparse, drad, make, masked_dense, relative_error
from support.marks import slow
from support.plain import PLAIN
from torch._dynamo.exc import BackendCompilerFailed


def check_sparse(compiled, model, kwargs, expected, sparsity=0.6):
    """The output is the model's with dense attention under the plan for just these sizes; returns the report."""
    text = (expected["n_text_before"], expected["n_text_after"])
    plan = drad.make_plan("dynamicrad", expected["grid"], 16, *text, sparsity=sparsity, regime="mid", profile=PLAIN)
    assert plan.sparsity > 0.05
    sparse = call(compiled, kwargs)
    with masked_dense(plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    return drad.report(compiled)


def test_found_by_name():
    assert "dynamicrad" in torch._dynamo.list_backends(exclude_tags=())


# All but the last have 240 tokens.
GRIDS = [dict(f=5, h=6, w=8), dict(f=5, h=8, w=6), dict(f=5, h=4, w=12), dict(f=10, h=4, w=6), dict(f=3, h=7, w=9)]


@pytest.mark.parametrize("dynamic", [None, True, slow(False)], ids=["auto", "dynamic", "static"])
@pytest.mark.parametrize("name", ["wan_t2v", slow("ltx"), slow("cogvideox_5b")])
def test_other_grids_never_meet_a_stale_plan(name, dynamic):
    model, _, _ = make(name)
    compiled = torch.compile(model, backend="dynamicrad", dynamic=dynamic, options={**OPTIONS, "sparsity": 0.6})
    for sizes in [*GRIDS, GRIDS[0]]:
        _, kwargs, expected = make(name, **sizes)
        report = check_sparse(compiled, model, kwargs, expected)
    assert all(site.replaced for site in report.sites if site.role == "video_self_attention")
    assert len(report.graphs) <= (5 if dynamic is False else 4)  # Dynamo alone makes as many


def test_marked_dynamic_frames_do_not_compile_again():
    model, _, _ = make("wan_t2v")
    compiled = compile_sparse(model, sparsity=0.6)
    for frames in (5, 7, 11):
        _, kwargs, expected = make("wan_t2v", f=frames)
        torch._dynamo.mark_dynamic(kwargs["hidden_states"], 2)
        report = check_sparse(compiled, model, kwargs, expected)
    assert len(report.graphs) == 1
    assert "made when the graph runs" in report.summary()


def test_other_batch_and_prompt_length_share_a_graph():
    model, _, expected = make("wan_t2v")
    compiled = compile_sparse(model, sparsity=0.6)
    for batch, text in ((1, 7), (2, 7), (2, 11), (3, 13), (4, 17)):
        _, other, _ = make("wan_t2v", batch=batch)
        other["encoder_hidden_states"] = torch.randn(batch, text, 16)
        report = check_sparse(compiled, model, other, expected)
    assert len(report.graphs) <= 4
    assert "made when the graph runs" not in report.summary()


@pytest.mark.parametrize("name", ["cogvideox_5b", "hunyuan_video"])
def test_other_text_length_inside_the_sequence(name):
    model, kwargs, expected = make(name)
    compiled = compile_sparse(model, sparsity=0.6)
    side = "n_text_before" if expected["n_text_before"] else "n_text_after"
    for text in (expected[side], 5, 21, 6):
        other = {**kwargs, "encoder_hidden_states": torch.randn(1, text, 16)}
        if "encoder_attention_mask" in kwargs:
            other["encoder_attention_mask"] = (torch.arange(text) < 4)[None].long()
        report = check_sparse(compiled, model, other, {**expected, side: text})
    assert len(report.graphs) <= 2


def test_key_padding_mask_is_a_runtime_value():
    model, kwargs, expected = make("hunyuan_video", batch=2)
    compiled = compile_sparse(model, sparsity=0.6)
    for valid in ((9, 1), (2, 5)):
        mask = torch.zeros(2, 9, dtype=torch.long)
        for row, n in enumerate(valid):
            mask[row, :n] = 1
        report = check_sparse(compiled, model, {**kwargs, "encoder_attention_mask": mask}, expected)
    assert len(report.graphs) == 1


def test_no_recompile_on_second_call():
    model, kwargs, _ = make("wan_t2v")
    compiled = compile_sparse(model)
    for _ in range(3):
        call(compiled, kwargs)
    assert len(drad.report(compiled).graphs) == 1


def test_wrong_grid_names_both_numbers():
    model, kwargs, _ = make("wan_t2v")
    compiled = compile_sparse(model, grid=(5, 6, 9))
    with pytest.raises(BackendCompilerFailed, match=r"5 x 6 x 9 = 270 tokens does not fit the 240"):
        call(compiled, kwargs)


def test_a_grid_that_the_graph_contradicts_is_refused():
    model, kwargs, _ = make("wan_t2v")
    message = r"grid 5 x 8 x 6 contradicts the graph: .* 240 .* blocks.0.attn1 are 5 x 6 x 8\. .*override_grid"
    with pytest.raises(BackendCompilerFailed, match=message):
        call(compile_sparse(model, grid=(5, 8, 6)), kwargs)
    torch._dynamo.reset()
    with pytest.raises(drad.GridError, match=message):
        drad.rewrite(torch.export.export(model, (), kwargs), {**OPTIONS, "grid": (5, 8, 6)})


def test_given_grid_overrides_the_trace():
    model, kwargs, expected = make("wan_t2v")
    compiled = compile_sparse(model, grid=(3, 8, 10), override_grid=True, sparsity=0.6)
    report = check_sparse(compiled, model, kwargs, {**expected, "grid": (3, 8, 10)})
    assert {site.grid for site in report.replaced} == {(3, 8, 10)}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(spasity=0.5), "unknown option 'spasity'. Did you mean 'sparsity'"),
        (dict(sparsity=1.5), "sparsity = 1.5"),
        (dict(grid=(5, 6)), "three positive integers"),
        (dict(override_grid=True), "override_grid = True: there is no grid"),
        (dict(block_size=100), "block_size = 100"),
        (dict(profile="no-such"), "no profile is called 'no-such'"),
        (dict(dense_steps=-1), "dense_steps = -1"),
        (dict(pattern="radal"), "pattern = 'radal'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_options_are_refused(options, match):
    compiled = compile_sparse(torch.nn.Linear(3, 3), **options)
    with pytest.raises(BackendCompilerFailed, match=match):
        call(compiled, {"input": torch.randn(2, 3)})


def test_strict_raises_where_a_site_stays_dense():
    model, kwargs, _ = make("wan_t2v")
    with pytest.raises(BackendCompilerFailed, match=r"strict=True, and blocks.0.attn1 stays dense: 240 tokens"):
        call(compile_sparse(model, strict=True, min_tokens=1000), kwargs)
    torch._dynamo.reset()
    compiled = compile_sparse(model, strict=True, dense_layers=1)
    call(compiled, kwargs)
    assert [site.replaced for site in drad.report(compiled).sites if site.grid] == [False, True]


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video", "ltx", "kandinsky5"])
def test_regional_compilation_reads_the_grid_from_the_rope_table(name):
    """One compiled block serves every grid of 240 tokens: the plan follows the table's values at run time."""
    model, _, _ = make(name)
    eager, _, _ = make(name)
    model.compile_repeated_blocks(backend="dynamicrad", options={**OPTIONS, "sparsity": 0.6})
    for sizes in (dict(f=5, h=6, w=8), dict(f=5, h=8, w=6), dict(f=5, h=4, w=12), dict(f=5, h=6, w=8)):
        _, kwargs, expected = make(name, **sizes)
        grid = expected["grid"]
        planned = sorted(grid[1:]) == [6, 8]
        pattern = {"sparsity": 0.6, "regime": "mid", "profile": PLAIN} if planned else {}
        text = (expected["n_text_before"], expected["n_text_after"])
        plan = drad.make_plan("dynamicrad" if planned else "dense", grid, 16, *text, **pattern)
        sparse = call(model, kwargs)
        with masked_dense(plan):
            assert relative_error(sparse, call(eager, kwargs)) < 1e-5
    report = drad.report(model)
    assert {site.grid for site in report.replaced} == {(5, 6, 8)}
    assert "5x6x8 and 5x8x6 run sparse" in report.summary()


def test_regional_compilation_with_a_grid_that_the_rope_table_contradicts():
    model, kwargs, _ = make("wan_t2v")
    model.compile_repeated_blocks(backend="dynamicrad", options={**OPTIONS, "grid": (5, 8, 6)})
    with pytest.raises(BackendCompilerFailed, match=r"grid 5 x 8 x 6 contradicts the graph.* are 5 x 6 x 8"):
        call(model, kwargs)


def test_a_given_grid_is_looked_for_at_every_call():
    """One compiled block serves every grid of as many tokens: another one than the given gets no plan of that."""
    model, kwargs, _ = make("wan_t2v")
    eager, _, _ = make("wan_t2v")
    model.compile_repeated_blocks(backend="dynamicrad", options={**OPTIONS, "grid": (5, 6, 8), "sparsity": 0.6})
    call(model, kwargs)
    _, other, expected = make("wan_t2v", f=5, h=4, w=12)
    assert expected["grid"] == (5, 4, 12)
    assert relative_error(call(model, other), call(eager, other)) < 1e-5


def test_regional_compilation_with_a_grid():
    model, kwargs, _ = make("wan_t2v")
    options = dict(OPTIONS, grid=(5, 6, 8), sparsity=0.6)
    reference, _, _ = make("wan_t2v")
    model.compile_repeated_blocks(backend="dynamicrad", options=options)
    sparse = call(model, kwargs)
    report = drad.report(model)
    assert len(report.replaced) == 1  # one compiled block serves both layers
    with masked_dense(report.replaced[0].plan):
        assert relative_error(sparse, call(reference, kwargs)) < 1e-5


def test_backward_works():
    model, kwargs, _ = make("wan_t2v")
    compiled = torch.compile(model, backend="dynamicrad", options=dict(min_tokens=0, inner="aot_eager"))
    out = compiled(**kwargs)[0]
    out.sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters() if p.requires_grad)
    assert len(drad.report(compiled).replaced) == 2


def test_inference_mode():
    model, kwargs, _ = make("wan_t2v")
    compiled = compile_sparse(model, sparsity=0.0)
    with torch.inference_mode():
        out = compiled(**kwargs)[0]
    assert relative_error(out, call(model, kwargs)) < 1e-5
    assert len(drad.report(compiled).replaced) == 2


def test_reports_of_two_compilations_of_one_model_are_apart():
    model, kwargs, _ = make("wan_t2v")
    one, two = compile_sparse(model, sparsity=0.3), compile_sparse(model, sparsity=0.7)
    call(one, kwargs)
    call(two, kwargs)
    first, second = (drad.report(c).replaced[0].sparsity for c in (one, two))
    assert first == pytest.approx(0.3, abs=0.02)
    assert second == pytest.approx(0.7, abs=0.02)


def test_compile_caches_see_the_signatures_of_our_ops(monkeypatch):
    """Code that was cached for other signatures would call the ops wrongly; a user's own entry stays."""
    seen = {}
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches: seen.update(config_patches) or gm
    )
    options = {"inner_options": {"aot_inductor.metadata": {"mine": "x"}}}
    torch.compile(lambda x: x + 1, backend="dynamicrad", options=options)(torch.zeros(2))
    digest = seen["aot_inductor.metadata"].pop("dynamicrad")
    assert len(digest) == 16
    assert seen["aot_inductor.metadata"] == {"mine": "x"}
