"""Compile a model as it is: its sites are replaced, its output is that of dense attention under the plan's mask."""

from __future__ import annotations

import torch

from support.graphs import OPTIONS, call, drad, masked_dense, relative_error

VIDEO = "video_self_attention"


def compiled(model, sparsity=0.0, **options):
    options = {**OPTIONS, "sparsity": sparsity, "mode": "static_ratio", "regime": "mid", "compensate": 0.0, **options}
    return torch.compile(model, backend="dynamicrad", options=options)


def check(model, kwargs, expected, tolerance=1e-5, sparsities=(0.0, 0.6), **options):
    """Compile the model as it is now, keeping all blocks and then few; returns the last report."""
    for sparsity in sparsities:
        torch._dynamo.reset()
        fast = compiled(model, sparsity, **options)
        check_call(fast, model, kwargs, tolerance)
        report = drad.report(fast)
        check_replaced(report, expected)
    return report


def check_call(fast, model, kwargs, tolerance=1e-5):
    """One call of a compiled model against the model with attention under the plan's mask."""
    out = call(fast, kwargs)
    plan = drad.report(fast).replaced[0].plan
    with masked_dense(plan):
        want = call(model, kwargs)
    error = relative_error(out, want)
    assert error < tolerance
    if plan.sparsity:
        assert relative_error(out, call(model, kwargs)) > 4 * error


def check_replaced(report, expected):
    assert len(report.graphs) == 1
    video = [site for site in report.sites if site.role == VIDEO]
    assert len(video) == expected["n_video_self_attn_nodes"]
    text = (expected["n_text_before"], expected["n_text_after"])
    assert all(site.replaced and site.grid == expected["grid"] and tuple(site.text_tokens) == text for site in video)
