"""The backend by name: options, later calls with other shapes, training, strictness, reports."""

from __future__ import annotations

import pytest
import torch
from helpers import call, compile_sparse, drad, make, masked_dense, relative_error
from torch._dynamo.exc import BackendCompilerFailed


def check_sparse(compiled, model, kwargs, number):
    """The newest graph's output is the model's with masked dense attention; returns the report."""
    sparse = call(compiled, kwargs)
    report = drad.report(compiled)
    assert len(report.graphs) == number
    plan = report.graphs[-1].sites and next(s.plan for s in report.graphs[-1].sites if s.replaced)
    with masked_dense(plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    return report


def test_found_by_name():
    assert "dynamicrad" in torch._dynamo.list_backends(exclude_tags=())


def test_other_resolution_never_meets_a_stale_plan():
    model, kwargs, _ = make("wan_t2v")
    compiled = compile_sparse(model, sparsity=0.6)
    check_sparse(compiled, model, kwargs, 1)
    # (5, 8, 6) and (5, 4, 12) have the same number of tokens as (5, 6, 8).
    for number, sizes in enumerate([dict(f=5, h=8, w=6), dict(f=5, h=4, w=12), dict(f=3, h=7, w=9)], 2):
        _, other, expected = make("wan_t2v", **sizes)
        report = check_sparse(compiled, model, other, number)
        assert report.graphs[-1].sites[0].grid == expected["grid"]
    # The first grid again: an old graph serves it.
    assert len(drad.report(compiled).graphs) == 4
    first = next(s.plan for s in drad.report(compiled).graphs[0].sites if s.replaced)
    sparse = call(compiled, kwargs)
    with masked_dense(first):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert len(drad.report(compiled).graphs) == 4


@pytest.mark.parametrize("dynamic", [None, True], ids=["auto", "dynamic"])
def test_ltx_grids_with_the_same_number_of_tokens(dynamic):
    model, _, _ = make("ltx")
    compiled = torch.compile(
        model, backend="dynamicrad", dynamic=dynamic,
        options=dict(sparsity=0.6, min_tokens=0, block_size=16, inner="eager"),
    )  # fmt: skip
    for sizes in (dict(f=5, h=6, w=8), dict(f=5, h=8, w=6), dict(f=5, h=4, w=12), dict(f=10, h=4, w=6)):
        _, other, expected = make("ltx", **sizes)
        sparse = call(compiled, other)
        graph = drad.report(compiled).graphs[-1]
        assert next(s.grid for s in graph.sites if s.replaced) == expected["grid"]
        with masked_dense(next(s.plan for s in graph.sites if s.replaced)):
            assert relative_error(sparse, call(model, other)) < 1e-5


def test_other_batch_and_prompt_length_share_a_graph():
    model, kwargs, _ = make("wan_t2v")
    compiled = compile_sparse(model, sparsity=0.6)
    call(compiled, kwargs)
    plan = drad.report(compiled).replaced[0].plan
    for batch, text in ((2, 7), (2, 11), (3, 13), (4, 17)):
        _, other, _ = make("wan_t2v", batch=batch)
        other["encoder_hidden_states"] = torch.randn(batch, text, 16)
        sparse = call(compiled, other)
        with masked_dense(plan):
            assert relative_error(sparse, call(model, other)) < 1e-5
    assert len(drad.report(compiled).graphs) <= 4


def test_other_text_length_inside_the_sequence():
    model, kwargs, _ = make("cogvideox_5b")
    compiled = compile_sparse(model, sparsity=0.6)
    check_sparse(compiled, model, kwargs, 1)
    for number, text in enumerate((5, 6), 2):
        other = {**kwargs, "encoder_hidden_states": torch.randn(1, text, 16)}
        report = check_sparse(compiled, model, other, number)
        assert tuple(report.graphs[-1].sites[0].text_tokens) == (text, 0)


def test_key_padding_mask_is_a_runtime_value():
    model, kwargs, _ = make("hunyuan_video", batch=2)
    compiled = compile_sparse(model, sparsity=0.6)
    check_sparse(compiled, model, kwargs, 1)
    for valid in ((9, 1), (2, 5)):
        mask = torch.zeros(2, 9, dtype=torch.long)
        for row, n in enumerate(valid):
            mask[row, :n] = 1
        check_sparse(compiled, model, {**kwargs, "encoder_attention_mask": mask}, 1)


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


def test_given_grid_overrides_the_trace():
    model, kwargs, _ = make("wan_t2v")
    compiled = compile_sparse(model, grid=(3, 8, 10), sparsity=0.6)
    report = check_sparse(compiled, model, kwargs, 1)
    assert {site.grid for site in report.replaced} == {(3, 8, 10)}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(spasity=0.5), "unknown option 'spasity'. Did you mean 'sparsity'"),
        (dict(sparsity=1.5), "sparsity = 1.5"),
        (dict(grid=(5, 6)), "three positive integers"),
        (dict(block_size=100), "block_size = 100"),
        (dict(profile="no-such"), "no profile is called 'no-such'"),
        (dict(dense_steps=3), "step gate"),
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


def test_regional_compilation_without_a_grid_stays_dense_and_says_why():
    model, kwargs, _ = make("wan_t2v")
    eager = call(model, kwargs)
    model.compile_repeated_blocks(backend="dynamicrad", options=dict(min_tokens=0, block_size=16, inner="eager"))
    assert relative_error(call(model, kwargs), eager) < 1e-5
    report = drad.report(model)
    assert report.sites
    assert not report.replaced
    assert "no frames x height x width in its 240 tokens" in str(report)


def test_regional_compilation_with_a_grid():
    model, kwargs, _ = make("wan_t2v")
    options = dict(min_tokens=0, block_size=16, inner="eager", grid=(5, 6, 8), sparsity=0.6)
    reference, _, _ = make("wan_t2v")
    model.compile_repeated_blocks(backend="dynamicrad", options=options)
    sparse = call(model, kwargs)
    report = drad.report(model)
    assert len(report.replaced) == 1  # one compiled block serves both layers
    with masked_dense(report.replaced[0].plan):
        assert relative_error(sparse, call(reference, kwargs)) < 1e-5


def test_training_stays_dense_and_backward_works():
    model, kwargs, _ = make("wan_t2v")
    compiled = torch.compile(model, backend="dynamicrad", options=dict(min_tokens=0, inner="aot_eager"))
    out = compiled(**kwargs)[0]
    out.sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters() if p.requires_grad)
    report = drad.report(compiled)
    assert not report.replaced
    assert "differentiated" in report.summary()


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


def test_marked_dynamic_frames_compile_again_for_another_length():
    model, kwargs, expected = make("wan_t2v")
    compiled = compile_sparse(model, sparsity=0.6)
    torch._dynamo.maybe_mark_dynamic(kwargs["hidden_states"], 2)
    check_sparse(compiled, model, kwargs, 1)
    _, other, _ = make("wan_t2v", f=7)
    torch._dynamo.maybe_mark_dynamic(other["hidden_states"], 2)
    check_sparse(compiled, model, other, 2)
    assert expected["grid"] == (5, 6, 8)
