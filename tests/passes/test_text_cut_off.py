"""One stream of text and video, compiled alone: text is cut off before RoPE and put back, the residual is added."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tokens import DIM, GRID, check_video, only, sites

TABLE = torch.cat(
    [
        torch.cos(torch.outer(line, torch.tensor([1.0, 0.3])))
        for line in torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in GRID), indexing="ij")).flatten(1)
    ],
    1,
)[:, torch.arange(DIM) % 6]  # [60, DIM]


def put_back(x, table, before, after):
    return torch.cat([x[:, :before], x[:, before : x.shape[1] - after] * table, x[:, x.shape[1] - after :]], 1)


def split(x, table, before, after):
    a, b, c = x.split([before, len(table), after], 1)
    return torch.cat([a, table * b, c], 1)


def narrow(x, table, before, after):
    end = before + len(table)
    return torch.cat([x.narrow(1, 0, before), x.narrow(1, before, len(table)) * table, x.narrow(1, end, after)], 1)


def rows_by_index(x, table, before, after):
    rows = torch.arange(x.shape[1])
    end = before + len(table)
    return torch.cat([x[:, rows[:before]], table * x[:, rows[before:end]], x[:, rows[end:]]], 1)


def in_place(x, table, before, after):
    x = x.clone()
    x[:, before : before + len(table)] = x[:, before : before + len(table)] * table
    return x


def times_in_place(x, table, before, after):
    x = x.clone()
    x[:, before : before + len(table)].mul_(table)
    return x


def new_buffer(x, table, before, after):
    out, end = torch.empty_like(x), before + len(table)
    out[:, :before], out[:, before:end], out[:, end:] = x[:, :before], table * x[:, before:end], x[:, end:]
    return out


def padded(x, table, before, after):
    return x * F.pad(table, (0, 0, before, after), value=1.0)


HOW = [put_back, split, narrow, rows_by_index, in_place, times_in_place, new_buffer, padded]


def block(rope, before, after, layers=2):
    """The same tokens, rotated but for their text, in layers with a residual."""

    def how(m, x, table):
        for _ in range(layers):
            q, k = rope(m.q(x), table, before, after), rope(m.k(x), table, before, after)
            x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]
        return x

    return how


@pytest.mark.parametrize("rope", HOW, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("before", "after"), [(0, 9), (9, 0), (4, 5), (0, 1)], ids=str)
def test_text_is_found_where_it_was_cut_off(rope, before, after):
    x = torch.randn(2, 60 + before + after, DIM)
    site = only(block(rope, before, after, layers=1), x, TABLE)
    check_video(site, before, after)


@pytest.mark.parametrize("rope", [put_back, in_place], ids=lambda f: f.__name__)
def test_layers_behind_each_other_agree(rope):
    found = sites(block(rope, 0, 9), torch.randn(2, 69, DIM), TABLE)
    assert len(found) == 2
    for site in found:
        check_video(site, 0, 9)


def test_two_streams_with_text_are_no_self_attention():
    def how(m, x, y, table):
        q, k = put_back(m.q(x), table, 0, 9), put_back(m.k(y), table, 0, 9)
        x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(y)[:, None])[:, 0]
        return x + y

    site = only(how, *torch.randn(2, 2, 69, DIM), TABLE)
    assert (site.role, site.reason.code) == ("cross_attention", "other_tokens_alike")


def test_rows_of_one_tensor_that_meet_each_other_are_not_one():
    """Differences of neighbours, and the whole."""

    def how(m, x, table):
        x = torch.cat([x[:, :1], x[:, 1:] - x[:, :-1]], 1)
        return m.attend(x * table) + x

    check_video(only(how, torch.randn(2, 60, DIM), TABLE))


def test_first_rows_aligned_in_place_do_not_hide_the_grid():
    def how(m, x, picture):
        x = x.clone()
        x[:, :15] += picture
        return m.attend(x).unflatten(1, GRID).permute(0, 4, 1, 2, 3)

    check_video(only(how, torch.randn(1, 60, DIM), torch.randn(1, 15, DIM)))
