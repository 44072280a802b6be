"""A conflict is local to what it contradicts, and a given grid does not overrule what the graph shows."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, drad
from support.tokens import GRID, LATENTS, Tokens, check_video, only, sites
from torch.nn.functional import scaled_dot_product_attention as sdpa

SQUARE = torch.randn(1, 3, 4, 6, 6)  # 4 x 3 x 3


def columns(x, sizes=GRID):
    """Tokens [..., S, D] column by column."""
    return x.unflatten(-2, sizes).transpose(-2, -3).flatten(-4, -2)


def rows(x, sizes=GRID):
    f, h, w = sizes
    return columns(x, (f, w, h))


def halves(m, x, sizes=GRID):
    """Heads of which the first has its tokens row by row, the second column by column."""
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
    q, k, v = (torch.cat([y[:, :1], columns(y[:, 1:], sizes)], 1) for y in (q, k, v))
    out = sdpa(q, k, v)
    return torch.cat([out[:, :1], rows(out[:, 1:], sizes)], 1).transpose(1, 2).flatten(2)


def written(m, x, sizes=GRID):
    """The same, written into a buffer."""
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
    both = []
    for y in (q, k, v):
        z = torch.empty_like(y)
        z[:, :1] = y[:, :1]
        z[:, 1:] = columns(y[:, 1:], sizes)
        both.append(z)
    out = sdpa(*both)
    return torch.cat([out[:, :1], rows(out[:, 1:], sizes)], 1).transpose(1, 2).flatten(2)


def added(m, x, sizes=GRID):
    """Sums of the two orders."""
    return m.attend(m.q(x) + columns(m.k(x), sizes))


MIXED = [halves, written, added]


SIZES = [(LATENTS, GRID), (SQUARE, (4, 3, 3)), (LATENTS[..., :4, :8], (4, 2, 4))]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("mixed", MIXED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("latents", "sizes"), SIZES, ids=["4x3x5", "4x3x3", "4x2x4"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_of_two_orders_is_dense_and_the_others_are_not(mixed, latents, sizes, given, turned):
    def layers(m, latents):
        x = m.tokens(latents)
        x = x + m.attend(x)
        x = mixed(m, x, sizes) + x if turned else x + mixed(m, x, sizes)
        return m.attend(x)

    before, mixture, after = sites(layers, latents, grid=sizes if given else None)
    for site in (before, after):
        assert (site.role, site.grid, site.reason) == ("video_self_attention", sizes, None)
    assert mixture.role == "unknown"
    assert mixture.reason.code == "axes_disagree"
    assert "override_grid" in mixture.reason.advice


def test_a_grid_that_is_meant_counts_in_a_layer_of_two_orders():
    model = Tokens(lambda m, latents: added(m, m.tokens(latents)))
    options = {**OPTIONS, "grid": GRID, "override_grid": True, "strict": True}
    compiled = torch.compile(model, backend="dynamicrad", options=options)
    with torch.no_grad():
        compiled(LATENTS)
    assert [site.grid for site in drad.report(compiled).replaced] == [GRID]


def test_a_layer_in_another_order_does_not_make_a_given_grid_an_error():
    def layers(m, latents):
        x = m.tokens(latents)
        x = x + rows(m.attend(columns(x)))
        return m.attend(x)

    column, row = sites(layers, LATENTS, grid=GRID)
    check_video(row)
    assert column.reason.code == "grid_contradicted"
    assert "4 x 5 x 3" in column.reason.text


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_a_given_grid_does_not_turn_tokens_around(dim):
    def how(m, x):
        return m.attend(m.tokens(x).flip(1) if dim == 1 else m.tokens(x.flip(dim)))

    assert only(how, LATENTS, grid=GRID).reason.code == "reversed_order"


def test_rows_cut_from_mixed_ones_and_pieces_of_them_are_mixed():
    def cut(m, latents):
        x = m.tokens(latents)
        mixture = m.q(x) + columns(m.k(x))
        part = torch.cat([mixture[:, 15:], mixture[:, :15]], 1)
        back = torch.cat([part[:, 45:], part[:, :45]], 1)
        m.attend(x + m.attend(back))
        return m.attend(torch.cat([mixture[:, :15], x[:, 15:]], 1))

    for site in (sites(cut, LATENTS)[0], sites(cut, LATENTS)[-1]):
        assert site.reason.code == "axes_disagree"
