"""Attention over some frames of a video: conditions that see themselves alone, chunks that read what is before them."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from support.graphs import compile_sparse, masked_dense, relative_error
from support.tokens import DIM, Tokens

import dynamicrad_compile as drad

F_, AREA = 7, 20
LATENTS = torch.randn(2, 3, F_, 8, 10)  # 7 x 4 x 5 tokens


def apart(*spans):
    """Attention of frames a..b to frames c..d, for each (a, b, c, d); one behind the other."""

    def how(m, x):
        x = m.tokens(x)
        q, k, v = (project(x)[:, None] for project in (m.q, m.k, m.v))
        rows = [slice(start * AREA, stop * AREA) for span in spans for start, stop in (span[:2], span[2:])]
        pairs = zip(rows[::2], rows[1::2], strict=True)
        out = torch.cat([F.scaled_dot_product_attention(q[:, :, a], k[:, :, b], v[:, :, b]) for a, b in pairs], 2)
        return (x + out[:, 0]).view(2, F_, 4, 5, DIM)

    return Tokens(how).eval()


WAYS = {
    "conditions in front": ((0, 3, 0, 3), (3, 7, 0, 7)),
    "conditions behind": ((0, 4, 0, 7), (4, 7, 4, 7)),
    "causal": ((0, 2, 0, 2), (2, 4, 0, 4), (4, 6, 0, 6), (6, 7, 0, 7)),
    "a window": ((0, 3, 0, 4), (3, 5, 1, 6), (5, 7, 3, 7)),
    "pieces": ((0, 3, 0, 3), (3, 7, 3, 7)),
}


@pytest.mark.parametrize("name", WAYS)
def test_frames_that_are_cut_out_are_a_video(name):
    model, spans = apart(*WAYS[name]), WAYS[name]
    with torch.no_grad():
        dense = model(LATENTS)
        assert relative_error(compile_sparse(model, sparsity=0.0)(LATENTS), dense) < 1e-6
        torch._dynamo.reset()
        compiled = compile_sparse(model, sparsity=0.6)
        sparse = compiled(LATENTS)
        sites = drad.report(compiled).sites
        for site, (a, b, c, d) in zip(sites, spans, strict=True):
            if d - c < 3:
                assert (site.role, site.code) == ("self_attention", "few_frames")
                continue
            asked = None if (a, b) == (c, d) else ((a - c) * AREA, (b - c) * AREA)
            assert (site.grid, site.queries, site.replaced) == ((d - c, 4, 5), asked, True)
        with ExitStack() as stack:
            for site in sites:
                if site.replaced:
                    stack.enter_context(masked_dense(site.plan))
            assert relative_error(sparse, model(LATENTS)) < 1e-6
    assert relative_error(sparse, dense) > 1e-4


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_conditions_of_a_fixed_length_in_front_of_any_number_of_frames(sparsity):
    def how(m, x):
        tokens = m.tokens(x)
        q, k, v = (project(tokens)[:, None] for project in (m.q, m.k, m.v))
        n = 4 * AREA
        first = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])
        rest = F.scaled_dot_product_attention(q[:, :, n:], k, v)
        return (tokens + torch.cat([first, rest], 2)[:, 0]).view(2, x.shape[2], 4, 5, DIM)

    model, latents = Tokens(how).eval(), LATENTS.clone()
    compiled = compile_sparse(model, sparsity=sparsity)
    torch._dynamo.mark_dynamic(latents, 2, min=6, max=21)
    with torch.no_grad():
        sparse = compiled(latents)
        with ExitStack() as stack:
            for site in drad.report(compiled).replaced:
                stack.enter_context(masked_dense(site.plan))
            assert relative_error(sparse, model(latents)) < 1e-6
        for x in (torch.randn(2, 3, frames, 8, 10) for frames in (6, 9)):
            assert relative_error(compiled(x), model(x)) < (1e-6 if sparsity == 0 else 0.3)
    assert (drad.report(compiled).sites[0].grid, len(drad.report(compiled).graphs)) == ((4, 4, 5), 1)
