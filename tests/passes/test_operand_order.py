"""`table * q` is `q * table`: what is found does not depend on the order of operands."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.tokens import DIM, GRID, LATENTS, check_video, only

LINES = [torch.randn(*(n if d == e else 1 for e, n in enumerate(GRID)), 1, DIM) for d in range(3)]  # [F,1,1,1,D], ...
ORDERS = {
    "q * table": lambda q, table: q * table,
    "table * q": lambda q, table: table * q,
    "addcmul": lambda q, table: torch.addcmul(table * q, table, q),
    "where": lambda q, table: torch.where(table > 0, table * q, q),
    "in place": lambda q, table: table.expand(q.shape).clone().mul_(q),
    "complex": lambda q, table: torch.view_as_real(
        torch.complex(table[..., ::2], table[..., 1::2]) * torch.view_as_complex(q.unflatten(-1, (-1, 2)))
    ).flatten(-2),
    "stack": lambda q, table: torch.stack([table[..., ::2] * q[..., ::2], table[..., 1::2] * q[..., 1::2]], -1).flatten(
        -2
    ),
}


def in_order(order, turn):
    """Tokens in an order of their axes, each line of a table [F, 1, 1, 1, D], [1, H, 1, 1, D], ... turned with them."""

    def how(m, x, *lines):
        x = m.patch(x).permute(0, *(2 + d for d in order), 1)[..., None, :]
        q, k = m.q(x), m.k(x)
        for line in lines:
            table = line.permute(*order, 3, 4)
            q, k = turn(q, table), turn(k, table)
        return F.scaled_dot_product_attention(*(z.flatten(1, 3).transpose(1, 2) for z in (q, k, m.v(x))))

    return how


@pytest.mark.parametrize("turn", ORDERS.values(), ids=ORDERS)
def test_the_grid_is_found_in_any_order_of_operands(turn):
    check_video(only(in_order((0, 1, 2), turn), LATENTS, *LINES))


@pytest.mark.parametrize("turn", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_in_another_order_are_no_grid_in_any_order_of_operands(turn, batch):
    site = only(in_order((1, 2, 0), turn), LATENTS.expand(batch, -1, -1, -1, -1), *LINES)
    assert (site.role, site.reason.code) == ("self_attention", "axes_swapped")


@pytest.mark.parametrize("turn", [ORDERS["q * table"], ORDERS["table * q"]], ids=["q * table", "table * q"])
def test_windows_are_noticed_in_any_order_of_operands(turn):
    def how(m, x, table):
        x = m.patch(x)[..., :2, :4].reshape(1, DIM, 4, 2, 1, 2, 2).permute(0, 3, 5, 2, 4, 6, 1).flatten(0, 2)
        q, k = turn(m.q(x), table), turn(m.k(x), table)
        return F.scaled_dot_product_attention(*(z.flatten(1, 3)[:, None] for z in (q, k, m.v(x))))

    assert only(how, LATENTS, torch.randn(1, 4, 1, 2, DIM)).reason.code == "windowed"


@pytest.mark.parametrize("first", ["q", "table"])
def test_two_videos_turned_by_matrices_are_no_self_attention(first):
    """The matrices are the outcome of a product as the tokens are."""

    def turn(q, matrix):
        pairs = q.unflatten(-1, (-1, 2))
        if first == "table":
            return (matrix @ pairs.unsqueeze(-1)).squeeze(-1).flatten(-2)
        return (pairs.unsqueeze(-2) @ matrix).squeeze(-2).flatten(-2)

    def how(m, x, y, ids):
        angles = (ids @ torch.ones(3, DIM // 2)).unsqueeze(0)
        matrix = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
        a, b = m.tokens(x), m.tokens(y, m.other)
        q, k = turn(m.q(a), matrix), turn(m.k(b), matrix)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(b)[:, None])

    ids = torch.stack(torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij"), -1).reshape(-1, 3).float()
    assert only(how, LATENTS, torch.randn_like(LATENTS), ids).role == "cross_attention"


@pytest.mark.parametrize("spelling", ["bnij,bnkj->bnki", "bnkj,bnij->bnki"])
@pytest.mark.parametrize("videos", [1, 2])
def test_matrices_of_places_may_differ_for_queries_and_keys(spelling, videos):
    """A camera's 4 x 4 for each token, turned for queries, inverted for keys, tell nothing of whose tokens they are."""

    def turn(tokens, matrix):
        operands = (matrix, tokens.unflatten(-1, (-1, 4)))
        return torch.einsum(spelling, *(operands if spelling.startswith("bnij") else operands[::-1])).flatten(-2)

    def how(m, x, y, cameras):
        a, b = m.tokens(x), m.tokens(y, m.other) if videos == 2 else m.tokens(x)
        matrix = torch.einsum("bnij,bnkj->bnik", cameras, cameras)
        inverse = torch.zeros_like(matrix)
        inverse[..., :3, :] = matrix.transpose(-1, -2)[..., :3, :]
        q, k = turn(m.q(a), matrix), turn(m.k(b), inverse)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(b)[:, None])

    site = only(how, LATENTS, torch.randn_like(LATENTS), torch.randn(1, math.prod(GRID), 4, 4))
    if videos == 1:
        check_video(site)
    else:
        assert site.role == "cross_attention"
