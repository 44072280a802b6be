"""Options: every mistake is told in our words, at once where we are called, at the first call where PyTorch is."""

from __future__ import annotations

import math
import pickle
import traceback

import numpy as np
import pytest
import torch
from support.graphs import OPTIONS, call, compile_sparse, drad, make

NUMBERS = (
    "sparsity",
    "compensate",
    "decay_factor",
    "sink_frames",
    "block_size",
    "dense_layers",
    "dense_steps",
    "dense_timestep",
    "refresh_steps",
    "min_tokens",
)
WAYS = {
    "torch.compile": lambda model, options: torch.compile(model, backend="dynamicrad", options=options),
    "model.compile": lambda model, options: (model.compile(backend="dynamicrad", options=options), model)[1],
    "blocks": lambda model, options: (model.compile_repeated_blocks(backend="dynamicrad", options=options), model)[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_an_error_at_the_first_call_is_ours_in_class_and_words(way):
    model, kwargs, _ = make("wan_t2v")
    with pytest.raises(drad.OptionsError) as caught:
        call(WAYS[way](model, {**OPTIONS, "sparsityy": 0.5}), kwargs)
    assert str(caught.value).startswith("unknown option 'sparsityy'. Did you mean 'sparsity'?")
    assert traceback.format_exception_only(caught.value)[0].startswith(
        "dynamicrad_compile.errors.OptionsError: unknown"
    )
    files = {entry.path.name for entry in caught.traceback}
    assert not files & {"backend.py", "passed_on.py", "options.py", "output_graph.py"}


def test_errors_of_the_passes_are_ours_too_and_can_be_pickled():
    model, kwargs, _ = make("wan_t2v")
    with pytest.raises(drad.GridError, match=r"\Agrid 5 x 6 x 9 = 270 tokens does not fit the 240") as caught:
        drad.explain(model, options={**OPTIONS, "grid": (5, 6, 9)}, **kwargs)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is drad.GridError
    assert str(again) == str(caught.value)
    with pytest.raises(drad.StrictError, match=r"\Astrict=True, and blocks.0.attn1 stays dense"):
        call(compile_sparse(model, strict=True, min_tokens=1000), kwargs)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, False, "1", math.nan, math.inf, [1], 1j], ids=repr)
def test_a_number_is_a_finite_number(name, value):
    with pytest.raises(drad.OptionsError, match=rf"option {name} = .*: expected a (finite )?number"):
        drad.Options(**{name: value})


def test_numbers_of_numpy_are_numbers():
    options = drad.Options(sparsity=np.float32(0.5), dense_steps=np.int64(3), grid=np.array([3, 4, 5]))
    assert (options.sparsity, options.dense_steps, options.grid) == (0.5, 3, (3, 4, 5))


@pytest.mark.parametrize("grid", ["123", (5, 6.5, 7), (5, 6, True), (5, math.nan, 7), {5, 6, 7}, (5, 6), 5, (0, 6, 7)])
def test_a_grid_is_three_positive_integers(grid):
    with pytest.raises(drad.OptionsError, match="three positive integers"):
        drad.Options(grid=grid)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"max_autotune": True}, drad.OptionsError, r"Inductor's: put it into inner_options.*'max_autotune': \.\.\."),
        ({"triton.cudagraphs": True}, drad.OptionsError, "put it into inner_options"),
        ({"fullgraph": True}, drad.OptionsError, r"keyword of torch.compile: torch.compile\(model, fullgraph=\.\.\.\)"),
        ({"inner_options": {"max_autotun": 1}}, drad.OptionsError, "Inductor has no option .* mean 'max_autotune'"),
        ({"inner": "inductr"}, drad.OptionsError, r"inner = 'inductr': .*Did you mean 'inductor'\?"),
        ({"inner": "dynamicrad"}, drad.OptionsError, "would call itself"),
        ({"profile": "wan-720"}, drad.ProfileError, "no profile is called 'wan-720'.*mean 'wan-720p'"),
        ({"profile": "nowhere/wan.toml"}, drad.ProfileError, "no profile at nowhere/wan.toml"),
        ({"router": "nowhere/router"}, drad.RouterError, "there is no router at nowhere/router"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_are_checked_at_once(options, kind, match):
    with pytest.raises(kind, match=match):
        drad.Options(**options)
    with pytest.raises(kind, match=match):
        drad.explain(torch.nn.Linear(3, 3), options=options, input=torch.ones(2, 3))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"mode": "max-autotun"}, r"unknown mode 'max-autotun'. Did you mean 'max-autotune'\?"),
        ({"mode": "max-autotun", "sparsity": 0.5}, "unknown mode"),
        ({"mode": "static-ratio"}, r"Did you mean 'static_ratio'\?"),
        ({"mode": "max-autotune", "inner": "eager"}, "mode='max-autotune' is for Inductor, but inner='eager'"),
    ],
    ids=str,
)
def test_a_mode_is_torch_compiles_or_ours(given, match):
    with pytest.raises(drad.OptionsError, match=match):
        drad.compile(torch.nn.Linear(3, 3), **given)


def test_an_unknown_mode_of_torch_compile_is_told_at_the_first_call():
    compiled = torch.compile(torch.nn.Linear(3, 3), backend="dynamicrad", mode="max-autotun")
    with pytest.raises(drad.OptionsError, match=r"\Aunknown mode 'max-autotun'. Did you mean 'max-autotune'\?"):
        compiled(torch.ones(2, 3))


def test_an_unknown_kernel_is_told_at_the_first_call(monkeypatch):
    monkeypatch.setenv("DYNAMICRAD_KERNEL", "gloun")
    with pytest.raises(drad.PlanError, match=r"\ADYNAMICRAD_KERNEL must be triton, .*, got 'gloun'"):
        torch.compile(torch.nn.Linear(2, 2), backend="dynamicrad")(torch.ones(1, 2))


def test_what_knows_our_operations_may_be_inner():
    for name in ("tensorrt", "eager", "aot_eager", "inductor"):
        assert drad.Options(inner=name).inner == name


def test_a_mistake_beside_a_dump_leaves_no_folder(tmp_path):
    for options, match in (({"sparsity": 2}, "sparsity"), ({"dump": tmp_path / "file" / "x"}, "expected a folder")):
        (tmp_path / "file").touch()
        with pytest.raises(drad.OptionsError, match=match):
            drad.Options(**{"dump": tmp_path / "new", **options})
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
