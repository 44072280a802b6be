"""Attention that is captured under a transform of torch.func, or for forward mode, stays dense and right."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.graphs import OPTIONS, drad
from support.spellings import SPELLINGS
from support.tiny_dit import TinyDiT
from torch.nn.attention import SDPBackend, sdpa_kernel

LATENTS, TANGENT = torch.randn(2, 1, 3, 4, 6, 10, generator=torch.Generator().manual_seed(3))


def model():
    return TinyDiT(SPELLINGS["sdpa"][0]).requires_grad_(False)


def codes(compiled):
    return {site.code for site in drad.report(compiled).sites}


def sparse(function):
    return torch.compile(function, backend="dynamicrad", options={**OPTIONS, "sparsity": 0.5})


def test_a_graph_captured_for_forward_mode():
    eager = model()
    compiled = sparse(eager)
    with sdpa_kernel(SDPBackend.MATH):
        _, want = torch.func.jvp(eager, (LATENTS,), (TANGENT,))
        with forward_ad.dual_level():
            out = compiled(forward_ad.make_dual(LATENTS, TANGENT))
            torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, want)
    # From 2.14 on Dynamo captures nothing there.
    assert codes(compiled) == ({"forward_mode"} if torch.__version__ < "2.14" else set())


def test_a_sparse_graph_loses_no_tangent():
    """Dynamo hands dual tensors to a graph that was captured without."""
    compiled = sparse(model())
    compiled(LATENTS)
    assert codes(compiled) == {""}
    with forward_ad.dual_level(), pytest.raises(drad.DerivativeError, match="no forward-mode derivative"):
        compiled(forward_ad.make_dual(LATENTS, TANGENT))


def test_a_compiled_model_under_a_transform():
    """Dynamo leaves such calls to eager code."""
    eager = model()
    compiled = sparse(eager)
    want = torch.func.grad(lambda x: eager(x).square().sum())(LATENTS)
    torch.testing.assert_close(torch.func.grad(lambda x: compiled(x).square().sum())(LATENTS), want)


def test_a_transform_inside_what_is_compiled():
    eager = model()

    def gradient(x):
        return torch.func.grad(lambda x: eager(x).square().sum())(x)

    def batch(x):
        return torch.vmap(lambda x: eager(x[None])[0])(x)

    for transformed in (gradient, batch):
        torch._dynamo.reset()
        compiled = sparse(transformed)
        torch.testing.assert_close(compiled(LATENTS), transformed(LATENTS))
        assert codes(compiled) == {"inside_transform"}
