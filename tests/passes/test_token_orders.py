"""Orders of the tokens: reordered, reversed, tiled, frame by frame."""

from __future__ import annotations

import pytest
import torch
from support.tokens import DIM, GRID, LATENTS, check_video, only, rotate, sites
from torch._dynamo.exc import BackendCompilerFailed


def put_in_order(order):
    def how(m, x):
        tokens = m.tokens(x)
        rows = torch.arange(60).view(GRID).permute(order).flatten()
        return m.attend(tokens[:, rows])

    return how


def test_an_index_that_reorders_the_grid_is_noticed():
    assert only(put_in_order((1, 2, 0)), LATENTS).reason.code == "reordered"


def unpatchified(m, x, sizes, order):
    out = m.attend(m.q(x)).reshape(1, *sizes, DIM)
    return out.permute(0, *(1 + d for d in order), 4)


def test_packed_tokens_are_told_by_an_unpatchify_that_is_given_back():
    packed = torch.randn(1, 60, DIM)
    check_video(only(lambda m, x: unpatchified(m, x, GRID, (0, 1, 2)), packed))
    for sizes, order in (((3, 5, 4), (2, 0, 1)), ((5, 4, 3), (1, 2, 0))):
        assert only(lambda m, x: unpatchified(m, x, sizes, order), packed).role == "self_attention"  # noqa: B023


def test_three_factors_alone_are_no_grid():
    def blocks(m, x):
        pooled = m.q(x).view(1, 4, 3, 5, DIM).mean((2, 3))
        return m.attend(x) + pooled.mean(1, keepdim=True)

    site = only(blocks, torch.randn(1, 60, DIM))
    assert site.role == "self_attention"
    assert site.reason.code == "only_a_reshape"


def tiles(m, x):
    x = m.patch(x)[..., :2, :4].reshape(1, DIM, 4, 1, 2, 2, 2).permute(0, 2, 3, 5, 4, 6, 1)
    return m.attend(x.reshape(1, -1, DIM))


def backwards(m, x):
    return m.attend(m.tokens(x).flip(1))


def serpentine(m, x):
    rows = [x[:, :, i].flip(-1) if i % 2 else x[:, :, i] for i in range(4)]
    return m.attend(m.tokens(torch.stack(rows, 2)))


def zigzag(m, x):
    video = m.patch(x)
    rows = [video[:, :, :, i].flip(-1) if i % 2 else video[:, :, :, i] for i in range(3)]
    return m.attend(torch.stack(rows, 3).flatten(2).transpose(1, 2))


def folded(m, x):
    """All frames below each other: 4 * 6 rows of 10."""
    return m.attend(m.patch(x.reshape(1, 3, 4, 6, 10)).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("how", "latents", "right", "wrong"),
    [
        (lambda m, x: m.attend(m.tokens(x)), LATENTS, GRID, [(4, 5, 3), (3, 4, 5), (2, 6, 5)]),
        (put_in_order((0, 2, 1)), LATENTS, (4, 5, 3), []),
        (tiles, LATENTS, None, [(4, 2, 4), (2, 4, 4)]),
        (folded, torch.randn(1, 3, 24, 10), GRID, [(4, 5, 3), (5, 4, 3)]),
        (lambda m, x: m.attend(x), torch.randn(1, 60, DIM), (3, 5, 4), []),
        (lambda m, x: m.attend(m.tokens(x)), torch.randn(1, 3, 1, 24, 10), (1, 12, 5), [(4, 5, 3)]),
    ],
    ids=["raster", "swapped", "tiles", "frames below each other", "packed", "picture"],
)
def test_a_given_grid_must_be_what_the_graph_shows(how, latents, right, wrong):
    if right is not None:
        assert only(how, latents, grid=right).grid == right
    for grid in wrong:
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match=f"grid {' x '.join(map(str, grid))} contradicts the graph"):
            only(how, latents, grid=grid)


@pytest.mark.parametrize("how", [backwards, serpentine, zigzag], ids=lambda f: f.__name__)
def test_tokens_in_reverse_order_are_left_dense(how):
    assert only(how, LATENTS).reason.code == "reversed_order"


def test_both_directions():
    def both(m, x):
        x = m.tokens(x)
        table = rotate(torch.ones(1, 60, DIM))
        return m.attend(x * table) + m.attend((x.flip(1)) * table).flip(1)

    forward, backward = sites(both, LATENTS)
    check_video(forward)
    assert backward.reason.code == "reversed_order"


def one_by_one(m, x):
    frames = [m.patch(x[:, :, i : i + 1]) + i for i in range(4)]
    return m.attend(torch.cat([y.flatten(2).transpose(1, 2) for y in frames], 1))


def selected_frames(m, x):
    frames = [m.patch(x[:, :, i].unsqueeze(2)).flatten(2).transpose(1, 2) for i in range(4)]
    return m.attend(torch.cat(frames, 1))


def stacked_frames(m, x):
    frames = torch.stack([m.patch(y.unsqueeze(2)).squeeze(2) for y in x.unbind(2)], 1)
    return m.attend(frames.permute(0, 1, 3, 4, 2).flatten(1, 3))


@pytest.mark.parametrize("how", [one_by_one, selected_frames, stacked_frames], ids=lambda f: f.__name__)
def test_frames_that_are_embedded_one_by_one(how):
    check_video(only(how, LATENTS))


def out_of_order(m, x):
    frames = [m.patch(x[:, :, i : i + 1]).flatten(2).transpose(1, 2) for i in (0, 2, 1, 3)]
    return m.attend(torch.cat(frames, 1))


def some_frames(m, x):
    frames = [m.patch(x[:, :, i : i + 1]).flatten(2).transpose(1, 2) for i in range(3)]
    return m.attend(torch.cat(frames, 1))


def two_dimensions(m, x):
    """Rows of one dimension, then columns of another of the same size: no axis."""
    x = m.patch(x[..., :8])
    frames = [x[:, :, 0], x[:, :, :, :, 1], x[:, :, 2], x[:, :, :, :, 3]]
    return m.attend(torch.cat([y[:, :, :3, :3].flatten(2).transpose(1, 2) for y in frames], 1))


@pytest.mark.parametrize("how", [out_of_order, some_frames, two_dimensions], ids=lambda f: f.__name__)
def test_other_frames_one_by_one_are_left_dense(how):
    site = only(how, LATENTS)
    assert site.reason
    assert site.role != "video_self_attention"


def test_tiles_are_named():
    assert only(tiles, LATENTS).reason.code == "tiled_order"


def test_few_frames_are_images():
    assert only(lambda m, x: m.attend(m.tokens(x)), LATENTS[:, :, :2]).reason.code == "few_frames"
