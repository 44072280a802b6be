"""Queries that are some of the keys: the video behind a prompt, a chunk of frames behind a cache of earlier ones."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from diffusers.models.transformers import transformer_anyflow_far
from support.graphs import OPTIONS, compile_sparse, first_output, masked_dense, relative_error
from support.marks import slow
from zoo.more import ZOO_MORE
from zoo.original import ZOO_ORIGINAL

import dynamicrad_compile as drad
from dynamicrad_compile.errors import GridError

CASES = {**ZOO_MORE, **ZOO_ORIGINAL}
KEYS = {  # grid of all keys, where those in front are earlier frames
    "sana_wm_refiner": (8, 6, 8),
    "causal_cache": (9, 6, 8),
    "causal_rolling_cache": (9, 6, 8),
}


def call(model, kwargs):
    """The output; caches in the arguments stay as they are."""
    with torch.no_grad():
        return first_output(model(**copy.deepcopy(kwargs)))


def sites_of(compiled):
    return [site for site in drad.report(compiled).sites if site.role == "video_self_attention"]


@pytest.mark.parametrize("name", KEYS)
def test_a_plan_that_keeps_all_changes_nothing(name):
    model, kwargs, expected = CASES[name](batch=2)
    compiled = compile_sparse(model, sparsity=0.0)
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) < 1e-5
    sites = sites_of(compiled)
    assert [site.replaced for site in sites] == [True] * expected["n_video_self_attn_nodes"]
    assert {(site.grid, tuple(site.text_tokens)) for site in sites} == {(expected["grid"], (0, 0))}
    assert {site.queries for site in sites} == {(expected["kv_extra_before"], sites[0].kv_length)}
    assert f"{sites[0].kv_length} ({sites[0].queries[0]}..{sites[0].queries[1]} ask)" in str(drad.report(compiled))


@pytest.mark.parametrize("grid", ["queries", "keys"])
@pytest.mark.parametrize("name", KEYS)
def test_any_plan_is_masked_dense_attention(name, grid):
    """Keys of which nothing is known are read by all; the grid of all keys is the user's to give."""
    model, kwargs, expected = CASES[name](batch=2)
    given = {"grid": KEYS[name]} if grid == "keys" else {}
    compiled = compile_sparse(model, sparsity=0.7, **given)
    sparse = call(compiled, kwargs)
    sites, before = sites_of(compiled), expected["kv_extra_before"]
    plan = sites[0].plan
    assert all(site.replaced and site.grid == (KEYS[name] if given else expected["grid"]) for site in sites)
    assert (plan.q_len, plan.kv_len) == (sites[0].shape[2], sites[0].kv_length)
    cached = plan.block_mask()[0, 0, :, : before // 16]
    assert bool(cached.all()) == (not given)
    with masked_dense(plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert relative_error(sparse, call(model, kwargs)) > 1e-6
    if given:
        assert plan.sparsity == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"box": (4, 2, 2)},
        {"pattern": "radial", "decay_factor": 0.3},
        {"plan": lambda grid, before, after, queries=None: drad.make_plan("radial", grid, 16, before, queries=queries)},
    ],
    ids=["boxes", "radial", "own"],
)
def test_boxes_other_patterns_and_own_plans(options):
    model, kwargs, _ = CASES["causal_cache"](batch=2)
    compiled = compile_sparse(model, grid=(9, 6, 8), **({"sparsity": 0.6} if "box" in options else {}), **options)
    sparse = call(compiled, kwargs)
    plan = sites_of(compiled)[0].plan
    assert plan.sparsity > 0.2
    assert (plan.q_order is None) == ("box" not in options)
    with masked_dense(plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5


def test_a_function_that_is_not_told_of_queries_leaves_it_dense():
    model, kwargs, _ = CASES["causal_cache"]()
    compiled = compile_sparse(model, plan=lambda grid, before, after: drad.make_plan("radial", grid, 16, before))
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) == 0
    assert {site.code for site in sites_of(compiled)} == {"plan_without_queries"}
    assert "queries=None" in sites_of(compiled)[0].advice


@pytest.mark.parametrize("mode", ["static_ratio", "dynamic_threshold"])
def test_whatever_stands_for_dropped_blocks_and_whoever_chooses(mode):
    """With everything kept by choice nothing changes; with less the error is that of an approximation."""
    model, kwargs, _ = CASES["causal_cache"](batch=2)
    dense = call(model, kwargs)
    errors = []
    for extra in ({"compensate": 0.0}, {"compensate": 1.0}, {"compensate": 1.0, "covariance": True}):
        compiled = compile_sparse(model, mode=mode, grid=(9, 6, 8), box=(4, 2, 2), sparsity=0.6, **extra)
        errors.append(relative_error(call(compiled, kwargs), dense))
        assert all(site.replaced for site in sites_of(compiled))
    assert 0 < errors[2] <= errors[1] < errors[0] < 0.2


@pytest.mark.parametrize("grid", [(4, 6, 8), (9, 8, 6), (12, 6, 8)])
def test_a_grid_that_fits_neither_queries_nor_keys(grid):
    model, kwargs, _ = CASES["causal_cache"]()
    with pytest.raises(GridError, match=r"does not fit the 144 video tokens .* the last frames of its 432 keys"):
        call(compile_sparse(model, grid=grid), kwargs)


def test_too_few_frames_that_ask():
    """The advice works: the grid of all keys."""
    model, kwargs, _ = CASES["causal_cache"](f=2)
    compiled = compile_sparse(model, sparsity=0.6)
    assert relative_error(call(compiled, kwargs), call(model, kwargs)) == 0
    (site, _) = sites_of(compiled)
    assert site.code == "few_frames_ask"
    assert "the last frames of its 288 keys" in site.advice
    compiled = compile_sparse(model, sparsity=0.6, grid=(6, 6, 8))
    sparse = call(compiled, kwargs)
    with masked_dense(sites_of(compiled)[0].plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5


def test_a_cache_that_grows():
    """Its length becomes symbolic; each call gets the plan of the length that it has."""
    model, kwargs, _ = CASES["causal_cache"]()
    compiled = torch.compile(model, backend="dynamicrad", options={**OPTIONS, "sparsity": 0.6}, dynamic=None)
    for chunk in (1, 2, 3, 4):
        kwargs["current_start"] = 144 * chunk
        sparse = call(compiled, kwargs)
        plan = drad.make_plan(
            "dynamicrad", (3, 6, 8), 16, 144 * chunk, queries=(144 * chunk, 144 * (chunk + 1)), sparsity=0.6
        )
        with masked_dense(plan):
            assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert len(drad.report(compiled).graphs) <= 3


@pytest.mark.parametrize("how", ["by name", "grid", "regional"])
def test_the_video_behind_a_prompt(how):
    model, kwargs, expected = CASES["cosmos3"]()
    options = {**OPTIONS, "sparsity": 0.6, **({"grid": expected["grid"]} if how == "grid" else {})}
    dense = call(model, kwargs)
    if how == "regional":
        compiled = copy.deepcopy(model)
        compiled.compile_repeated_blocks(backend="dynamicrad", options=options)
    else:
        compiled = torch.compile(model, backend="dynamicrad", options=options)
    sparse = call(compiled, kwargs)
    sites = [site for site in sites_of(compiled) if site.replaced]
    assert {(site.grid, site.queries) for site in sites} == {((5, 6, 8), (9, 249))}
    with masked_dense(sites[0].plan):
        assert relative_error(sparse, call(model, kwargs)) < 1e-5
    assert relative_error(sparse, dense) > 1e-6
    if how == "by name":  # positions are looked at in each call
        moved = torch.cat([torch.arange(9), 9 + torch.randperm(240)])
        kwargs["position_ids"] = kwargs["position_ids"][:, moved]
        assert relative_error(call(compiled, kwargs), call(model, kwargs)) < 1e-5
        assert len(drad.report(compiled).graphs) == 1


@contextmanager
def without_flex():
    """Inside, the model calls PyTorch's own attention in the place of FlexAttention, which takes no mask here."""
    dispatch = transformer_anyflow_far.dispatch_attention_fn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformer_anyflow_far, "dispatch_attention_fn", lambda *x, backend, **named: dispatch(*x, **named)
        )
        yield


@pytest.mark.parametrize("sizes", [(2, 8, 8), slow((3, 6, 8)), slow((4, 8, 4))], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_keys_that_are_rotated_as_frames_of_one_video_are_its_grid(sizes, sparsity):
    """The table is over cache and chunk together; some chunks are padded to 256 tokens."""
    frames, height, width = sizes
    model, kwargs, expected = CASES["anyflow_far_infer"](*sizes, batch=2)
    compiled = compile_sparse(model, sparsity=sparsity, strict=True)
    sparse = call(compiled, kwargs)
    (site, _) = sites_of(compiled)
    before, padding = 3 * height * width, expected["n_text_after"]
    assert site.grid == expected["grid"] == (3 + frames, height, width)
    assert site.queries == (before, before + frames * height * width + padding)
    assert tuple(site.text_tokens) == (0, padding)
    assert (site.plan.sparsity > 0.2) == (sparsity > 0)
    with masked_dense(site.plan), without_flex():
        assert relative_error(sparse, call(model, kwargs)) < 1e-5


def test_the_frames_of_a_cache_may_be_left_out_of_the_grid():
    """Then its keys are read by all."""
    model, kwargs, _ = CASES["anyflow_far_infer"](f=3)
    compiled = compile_sparse(model, sparsity=0.6, grid=(3, 8, 8))
    sparse = call(compiled, kwargs)
    (site, _) = sites_of(compiled)
    assert site.grid == (3, 8, 8)
    assert bool(site.plan.block_mask()[0, 0, :, :12].all())
    with masked_dense(site.plan), without_flex():
        assert relative_error(sparse, call(model, kwargs)) < 1e-5


def test_keys_from_another_graph_are_no_prompt():
    """More keys than queries, both inputs of the graph: nothing is proven of them."""
    compiled = torch.compile(attend, backend="dynamicrad", options=OPTIONS)
    q, k = torch.randn(1, 2, 240, 16), torch.randn(1, 2, 640, 16)
    compiled(q, k)
    (site,) = drad.report(compiled).sites
    assert (site.role, site.code) == ("unknown", "behind_graph_break")
    assert site.advice == "compile what computes them together with it"


def attend(q, k):
    return torch.nn.functional.scaled_dot_product_attention(q, k, k)


@pytest.mark.parametrize("box", ["raster", (4, 2, 2)])
def test_gradients(box):
    """Of the queries' loss with respect to the weights, against masked dense attention."""
    model, kwargs, _ = CASES["sana_wm_refiner"]()
    compiled = compile_sparse(model, sparsity=0.6, grid=(8, 6, 8), box=box)

    def gradient():
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def loss(run):
        model.zero_grad()
        first_output(run(**copy.deepcopy(kwargs))).square().sum().backward()
        return gradient()

    found = loss(compiled)
    plan = sites_of(compiled)[0].plan
    with masked_dense(plan), torch.enable_grad():
        wanted = loss(model)
    assert len(found) == len(wanted) > 0
    total = sum(float(x.square().sum()) for x in wanted) ** 0.5
    assert all(float((a - b).norm()) < 1e-4 * total for a, b in zip(found, wanted, strict=True))
