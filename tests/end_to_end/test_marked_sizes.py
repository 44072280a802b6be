"""Sizes marked as dynamic stay dynamic: sparse where a plan can follow them, else dense with a reason."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, drad, relative_error
from support.plain import PLAIN
from zoo.original_blocks import BLOCKS

FIXED = drad.make_plan("dynamicrad", (5, 6, 8), 16, text_before=9, sparsity=0.6, profile=PLAIN)
TOKENS = {"img": 1, "x": 1, "pe": 1, "freqs_cos": 0, "freqs_sin": 0}


def run(name, frames, bounds=None, change=lambda model, kwargs: None, **options):
    """(report, for each number of frames whether it ran "s"parse or "d"ense)."""
    model, _, _ = BLOCKS[name]()
    options = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0, **options}
    compiled, letters = torch.compile(model, backend="dynamicrad", fullgraph=True, options=options), ""
    for f in frames:
        kwargs = BLOCKS[name](f=f)[1]
        change(model, kwargs)
        for key, dim in TOKENS.items():
            if key in kwargs:
                torch._dynamo.mark_dynamic(kwargs[key], dim, **(bounds or {}))
        with torch.no_grad():
            out, expected = (x[0] for x in (compiled(**kwargs), model(**kwargs)))
        letters += "d" if relative_error(out, expected) < 1e-5 else "s"
    return drad.report(compiled), letters


BOUNDS = {"min": 64, "max": 4096}


@pytest.mark.parametrize(
    ("name", "bounds"),
    [("hunyuan_single_blocks", None), ("flux_blocks", None), ("rows_rotated_in_place", BOUNDS)],
)
def test_one_graph_serves_all_lengths(name, bounds):
    report, letters = run(name, (5, 7, 6), bounds)
    assert (letters, len(report.graphs)) == ("sss", 1)


def without_positions(model, kwargs):
    for key in ("pe", "freqs_cos", "freqs_sin"):
        if key in kwargs:
            kwargs[key] = torch.zeros_like(kwargs[key])


@pytest.mark.parametrize(
    "options",
    [{"grid": (5, 6, 8)}, {"plan": FIXED, "sparsity": None}, {"plan": lambda grid, *text: None, "sparsity": None}],
    ids=["grid", "plan", "plan-none"],
)
def test_what_can_not_follow_stays_dense(options):
    change = without_positions if "grid" in options else lambda model, kwargs: None
    report, letters = run("flux_blocks", (5, 7), change=change, **options)
    assert (letters, len(report.graphs)) == ("dd", 1)
    assert all(site.reason for site in report.sites)


def test_the_advice_works():
    """maybe_mark_dynamic, or no mark at all."""
    model, kwargs, _ = BLOCKS["flux_blocks"]()
    without_positions(model, kwargs)
    torch._dynamo.maybe_mark_dynamic(kwargs["img"], 1)
    compiled = torch.compile(model, backend="dynamicrad", options={**OPTIONS, "grid": (5, 6, 8)})
    with torch.no_grad():
        compiled(**kwargs)
    assert len(drad.report(compiled).replaced) == 2


@pytest.mark.parametrize("frames", [(5, 7), (7, 5)], ids=str)
def test_bounds_are_not_narrowed_by_min_tokens(frames):
    report, _ = run("rows_rotated_in_place", frames, BOUNDS, min_tokens=300)
    assert len(report.graphs) == 1
