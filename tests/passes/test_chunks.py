"""Axes that are already cut when a table tells them: RoPE chunk by chunk, attention within each frame before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tokens import DIM, GRID, LATENTS, check_video, only

AREA = GRID[1] * GRID[2]
LINES = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in GRID), indexing="ij")).flatten(1)
TABLE = torch.cat([torch.cos(torch.outer(line, torch.tensor([1.0, 0.3]))) for line in LINES], 1)
TABLE = TABLE[:, torch.arange(DIM) % 6]  # [60, DIM]


def frame_by_frame(x, t):
    return torch.cat([x[:, i : i + AREA] * t[i : i + AREA] for i in range(0, len(t), AREA)], 1)


def chunks(x, t):
    return torch.cat([b * a for a, b in zip(x.chunk(4, 1), t.chunk(4), strict=True)], 1)


def segments(x, t):
    return torch.cat([a * b for a, b in zip(x.split([30, 15, 15], 1), t.split([30, 15, 15]), strict=True)], 1)


def across_frames(x, t):
    return torch.cat([a * b for a, b in zip(x.split(16, 1), t.split(16), strict=True)], 1)


def in_place(x, t):
    x = x.clone()
    for i in range(0, len(t), AREA):
        x[:, i : i + AREA] *= t[i : i + AREA]
    return x


def half_of_the_features(x, t):
    return torch.cat([x[..., : DIM // 2] * t[:, : DIM // 2], x[..., DIM // 2 :]], -1)


def frames_of(x):
    return x.view(*x.shape[:-2], GRID[0], AREA, DIM)


def table_of_frames(x, t):
    return torch.cat([x[:, i * AREA : (i + 1) * AREA] * frame for i, frame in enumerate(frames_of(t).unbind())], 1)


def table_of_frames_first(x, t):
    return torch.cat([frames_of(t)[i] * x[:, i * AREA : (i + 1) * AREA] for i in range(GRID[0])], 1)


def both_in_frames(x, t):
    x, t = frames_of(x), frames_of(t)
    return torch.cat([x[:, i] * t[i] for i in range(GRID[0])], 1)


def stacked_again(x, t):
    x, t = frames_of(x), frames_of(t)
    return torch.stack([x[:, i] * t[i] for i in range(GRID[0])], 1).flatten(1, 2)


def tokens_in_frames(x, t):
    return torch.cat([y * t[i * AREA : (i + 1) * AREA] for i, y in enumerate(frames_of(x).unbind(1))], 1)


def frames_squeezed(x, t):
    frames = frames_of(t).split(1)
    return torch.cat([y * frame.squeeze(0) for y, frame in zip(x.split(AREA, 1), frames, strict=True)], 1)


def frames_flattened(x, t):
    t = frames_of(t)
    return torch.cat([x[:, i * AREA : (i + 1) * AREA] * t[i : i + 1].flatten(0, 1) for i in range(GRID[0])], 1)


def into_a_buffer(x, t):
    out, t = torch.empty_like(x), frames_of(t)
    for i in range(GRID[0]):
        out[:, i * AREA : (i + 1) * AREA] = x[:, i * AREA : (i + 1) * AREA] * t[i]
    return out


IN_FRAMES = [
    table_of_frames, table_of_frames_first, both_in_frames, stacked_again, tokens_in_frames, frames_squeezed,
    frames_flattened, into_a_buffer,
]  # fmt: skip


@pytest.mark.parametrize("rope", IN_FRAMES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("by_block", [True, False], ids=["block", "whole"])
def test_tables_that_are_taken_frame_by_frame(rope, by_block):
    def how(m, x, table):
        x = x if by_block else m.tokens(x)
        q, k = rope(m.q(x), table), rope(m.k(x), table)
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]

    check_video(only(how, torch.randn(2, 60, DIM) if by_block else LATENTS, TABLE))


def reversed_table(x, t):
    t = frames_of(t).flip(0)
    return torch.cat([x[:, i * AREA : (i + 1) * AREA] * t[i] for i in range(GRID[0])], 1)


def other_frames(x, t):
    t = frames_of(t)
    return torch.cat([x[:, i * AREA : (i + 1) * AREA] * t[-1 - i] for i in range(GRID[0])], 1)


def other_places(x, t):
    out, t = torch.zeros_like(x), frames_of(t)
    for i in range(GRID[0]):
        out[:, i * AREA : (i + 1) * AREA] = frames_of(x)[:, -1 - i] * t[-1 - i]
    return out


def one_frame_twice(x, t):
    x, t = frames_of(x), frames_of(t)
    return torch.cat([x[:, max(i, 1)] * t[max(i, 1)] for i in range(GRID[0])], 1)


def never_written(x, t):
    out, t = torch.zeros_like(x), frames_of(t)
    for i in range(GRID[0] - 1):
        out[:, i * AREA : (i + 1) * AREA] = frames_of(x)[:, i] * t[i]
    return out


def by_column(x, t):
    x, t = x.view(-1, AREA, GRID[0], DIM), t.view(AREA, GRID[0], DIM)
    return torch.cat([x[:, :, i] * t[:, i] for i in range(GRID[0])], 1)


OTHERWISE = [reversed_table, other_frames, other_places, one_frame_twice, never_written, by_column]


@pytest.mark.parametrize("rope", OTHERWISE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("by_block", [True, False], ids=["block", "whole"])
@pytest.mark.parametrize("both", [True, False], ids=["both", "query"])
def test_frames_in_another_order_are_no_grid_and_no_prompt(rope, by_block, both):
    def how(m, x, table):
        x = x if by_block else m.tokens(x)
        q, k = rope(m.q(x), table), rope(m.k(x), table) if both else frame_by_frame(m.k(x), table)
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]

    site = only(how, torch.randn(2, 60, DIM) if by_block else LATENTS, TABLE)
    assert site.role != "cross_attention"
    only_the_table = rope in (reversed_table, other_frames) and not by_block  # the tokens are in their places
    assert site.reason or (only_the_table and site.grid == GRID)


@pytest.mark.parametrize(
    "rope", [frame_by_frame, chunks, segments, across_frames, in_place, half_of_the_features], ids=lambda f: f.__name__
)
def test_rope_chunk_by_chunk(rope):
    def how(m, x, table):
        q, k = rope(m.q(x), table), rope(m.k(x), table)
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]

    check_video(only(how, torch.randn(2, 60, DIM), TABLE))


@pytest.mark.parametrize("when", ["before", "after"])
def test_frames_that_were_in_the_batch(when):
    """Each frame attends to its own audio, say."""

    def audio(m, x, keys):
        y = m.q(x).reshape(-1, AREA, DIM)
        return x + (y * keys.mean(1, keepdim=True)).reshape(x.shape)

    def how(m, x, table, keys):
        x = audio(m, x, keys) if when == "before" else x
        q, k = m.q(x) * table, m.k(x) * table
        x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]
        return audio(m, x, keys) if when == "after" else x

    check_video(only(how, torch.randn(1, 60, DIM), TABLE, torch.randn(4, 3, DIM)))


def test_halves_in_exchange_are_no_grid():
    def how(m, x, table):
        q, k = (torch.cat([z[:, :30] * table[30:], z[:, 30:] * table[:30]], 1) for z in (m.q(x), m.k(x)))
        return F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]

    site = only(how, torch.randn(1, 60, DIM), TABLE)
    assert site.grid is None
    assert site.reason


def test_a_reshape_that_fits_no_grid_of_the_table_stays_dense():
    """Rows of 10 where the table has frames of 15."""

    def how(m, x, table):
        x = x + m.q(x).reshape(1, 6, 10, DIM).mean(2, keepdim=True).expand(-1, -1, 10, -1).reshape(x.shape)
        q, k = m.q(x) * table, m.k(x) * table
        return F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]

    site = only(how, torch.randn(1, 60, DIM), TABLE)
    assert site.grid is None
    assert site.reason


def test_a_reshape_and_a_table_that_shows_nothing_are_no_grid():
    def how(m, x, table):
        x = x + m.q(x).reshape(1, 6, 2, 5, DIM).mean((2, 3)).mean(1, keepdim=True)
        q, k = m.q(x) * table, m.k(x) * table
        return F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]

    assert only(how, torch.randn(1, 60, DIM), torch.randn(60, DIM)).reason


def test_a_reference_with_a_table_of_its_own_is_no_frame():
    """Rows behind the video are turned by another table than the one whose rows go on like frames."""

    def how(m, x, table, other):
        q, k = (torch.cat([z[:, :45] * table[:45], z[:, 45:] * other], 1) for z in (m.q(x), m.k(x)))
        return F.scaled_dot_product_attention(q[:, None], k[:, None], m.v(x)[:, None])[:, 0]

    site = only(how, torch.randn(1, 60, DIM), TABLE, torch.randn(15, DIM))
    assert site.grid != GRID


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1)])
def test_tables_of_two_orders_each_for_rows_of_its_own(order):
    """Each tells the grid by itself; together they put tokens of two orders into one sequence."""

    def how(m, x, table, other):
        def rope(t):
            return torch.cat([t[:, :30] * table[:30], t[:, 30:] * other[30:]], 1)

        return x + F.scaled_dot_product_attention(rope(m.q(x))[:, None], rope(m.k(x))[:, None], m.v(x)[:, None])[:, 0]

    x = torch.randn(1, len(TABLE), DIM)
    permuted = TABLE.unflatten(0, GRID).permute(*order, 3).flatten(0, 2)
    assert only(how, x, TABLE, TABLE.clone()).grid == GRID
    assert only(how, x, TABLE, permuted).reason.code == "positions_disagree"
