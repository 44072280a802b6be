"""Buffers that are filled in pieces: tokens whose place is known are followed, those in an unknown order are not."""

from __future__ import annotations

import pytest
import torch
from support.graphs import drad
from support.tokens import DIM, GRID, LATENTS, Tokens, check_video, only


def slices(m, x, text):
    out = x.new_zeros(1, 67, DIM)
    out[:, :7], out[:, 7:] = text, m.tokens(x)
    return m.attend(out)


def copies(m, x, text):
    out = x.new_zeros(1, 67, DIM).index_copy(1, torch.arange(7), text)
    return m.attend(out.index_copy(1, torch.arange(60) + 7, m.tokens(x)))


def puts(m, x, text):
    out = torch.empty(1, 67, DIM)
    out[:, torch.arange(7, 67)] = m.tokens(x)
    out[:, torch.arange(7)] = text
    return m.attend(out)


def scatters(m, x, text):
    rows = torch.arange(7, 67).view(1, -1, 1).expand(1, 60, DIM)
    out = x.new_zeros(1, 67, DIM).scatter(1, rows, m.tokens(x))
    out[:, :7] += text
    return m.attend(out)


def slice_scatters(m, x, text):
    out = torch.slice_scatter(x.new_zeros(1, 67, DIM), text, 1, 0, 7)
    return m.attend(torch.slice_scatter(out, m.tokens(x), 1, 7))


def frame_by_frame(m, x, text):
    video = m.tokens(x)
    out = torch.zeros(1, 67, DIM)
    for i in range(4):
        out[:, 7 + 15 * i : 22 + 15 * i] = video[:, 15 * i : 15 * i + 15]
    return m.attend(torch.cat([text, out[:, 7:]], 1))


@pytest.mark.parametrize(
    "how", [slices, copies, puts, scatters, slice_scatters, frame_by_frame], ids=lambda f: f.__name__
)
def test_buffers_filled_piece_by_piece(how):
    check_video(only(how, LATENTS, torch.randn(1, 7, DIM)), before=7)


def by_input(m, x, rows):
    out = x.new_zeros(1, 60, DIM)
    out[:, rows] = m.tokens(x)
    return m.attend(out)


def reused(m, x, rows):
    """A copy of the video is overwritten in another order: it must not pass for the video."""
    out = m.tokens(x).clone()
    out[:, rows] = m.tokens(x) * 2
    return m.attend(out)


def copied_over(m, x, rows):
    out = torch.empty_like(m.tokens(x)).copy_(m.tokens(x))
    out.copy_(out.flip(1) + 0)
    return m.attend(out)


def transposed_in_place(m, x, rows):
    out = m.tokens(x[:, :, :, :4, :4].repeat(1, 1, 1, 1, 1))[:, :8].clone()
    return m.attend(out.transpose_(1, 2))


def repeated(m, x, rows):
    return m.attend(m.tokens(x).index_select(1, torch.arange(60).view(4, 15).T.flatten()))


@pytest.mark.parametrize(
    "how", [by_input, reused, copied_over, transposed_in_place, repeated], ids=lambda f: f.__name__
)
def test_rows_in_an_unknown_order_are_left_dense(how):
    site = only(how, LATENTS, torch.randperm(60))
    assert site.reason
    assert site.role != "video_self_attention"


def coordinates_read_and_written(m, x):
    """What ComfyUI's models do to make a RoPE table: a slice of zeros becomes itself and the coordinate."""
    ids = torch.zeros(4, 3, 5, 3)
    ids[..., 0] = ids[..., 0] + torch.arange(4.0).view(-1, 1, 1)
    ids[:, :, :, 1] = ids[:, :, :, 1] + torch.linspace(0, 2, steps=3).view(1, -1, 1)
    ids[1:, ..., 2] = ids[1:, ..., 2] + torch.arange(5.0)
    return m.attend(m.tokens(x) * ids.reshape(1, -1, 3).sum(-1, keepdim=True).cos())


def test_a_slice_may_be_written_with_what_was_read_there():
    model = Tokens(coordinates_read_and_written)
    (site,) = drad.explain(model, LATENTS, options={"min_tokens": 0, "block_size": 16}).replaced
    assert site.grid == GRID
