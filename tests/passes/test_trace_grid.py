"""The axis trace on small graphs: whose tokens they are, buffers filled in pieces, orders, several videos."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import capture, sites_of
from torch import nn

LATENTS = torch.randn(1, 3, 4, 6, 10)  # 4 x 3 x 5 = 60 tokens
GRID = (4, 3, 5)
DIM = 8


class Tokens(nn.Module):
    """A patch embedding with projections; `forward` is given by the test."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.patch = nn.Conv3d(3, DIM, (1, 2, 2), (1, 2, 2))
        self.other = nn.Conv3d(3, DIM, (1, 2, 2), (1, 2, 2))
        self.q, self.k, self.v, self.qkv = (nn.Linear(DIM, n) for n in (DIM, DIM, DIM, 3 * DIM))

    def tokens(self, latents, embed=None):
        return (embed or self.patch)(latents).flatten(2).transpose(1, 2)

    def attend(self, x, y=None):
        y = x if y is None else y
        return F.scaled_dot_product_attention(self.q(x)[:, None], self.k(y)[:, None], self.v(y)[:, None])[:, 0]

    def forward(self, *args):
        return self.how(self, *args)


def sites(how, *args):
    return sites_of(capture(Tokens(how), *args))


def only(how, *args):
    (site,) = sites(how, *args)
    return site


def rotate(x):
    """RoPE of one table, made in the graph."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")).flatten(1).sum(0)
    return x * grid.float().cos()[None, :, None]


def check_video(site, before=0, after=0):
    assert (site.role, site.grid, tuple(site.text)) == ("video_self_attention", GRID, (before, after))
    assert site.reason is None


# Whose tokens


def two_videos(m, x, y):
    a, b = m.tokens(x), m.tokens(y)
    return m.attend(rotate(m.q(a)), rotate(m.q(b)))


def control(m, x, y):
    return m.attend(m.tokens(x) + m.tokens(y, m.other), m.tokens(y, m.other))


def mutual(m, x, y):
    a, b = m.tokens(x), m.tokens(y)
    return m.attend(a + m.attend(a, b), b + m.attend(b, a))


def halves_of_the_batch(m, x, y):
    a, b = rotate(m.tokens(torch.cat([x, y]))).chunk(2)
    return m.attend(a, b)


def halves_of_the_channels(m, x, y):
    both = torch.cat([x, y], 1)
    return m.attend(m.tokens(both[:, :3]), m.tokens(both[:, 3:]))


def stacked(m, x, y):
    a, b = torch.stack([m.tokens(x), m.tokens(y)]).unbind(0)
    return m.attend(a, b)


@pytest.mark.parametrize(
    "how", [two_videos, control, mutual, halves_of_the_batch, halves_of_the_channels, stacked], ids=lambda f: f.__name__
)
def test_attention_from_one_video_to_another_is_cross_attention(how):
    for site in sites(how, LATENTS, torch.randn_like(LATENTS)):
        assert site.role == "cross_attention"
        assert site.reason.code in ("other_tokens", "other_tokens_alike")


def fused(m, x):
    q, k, v = m.qkv(m.tokens(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)


def split_unevenly(m, x):
    q, k, v, _ = torch.split(torch.cat([m.qkv(m.tokens(x)), m.tokens(x)], -1), [DIM] * 4, -1)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])


def controlled(m, x):
    a = m.tokens(x) + m.tokens(x * 2, m.other)
    return m.attend(a + m.attend(a))


def rotated(m, x):
    return m.attend(rotate(m.q(m.tokens(x))))


@pytest.mark.parametrize("how", [fused, split_unevenly, controlled, rotated], ids=lambda f: f.__name__)
def test_queries_and_keys_of_one_tensor_are_self_attention(how):
    for site in sites(how, LATENTS):
        check_video(site)


def test_queries_and_keys_that_come_from_outside_are_left_dense():
    q, k = torch.randn(2, 1, 60, DIM)
    site = only(
        lambda m, q, k: F.scaled_dot_product_attention(rotate(q)[:, None], rotate(k)[:, None], k[:, None]), q, k
    )
    assert site.role == "cross_attention"


# Buffers


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


# Orders


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


# Several videos


def image(m, x):
    return m.v(x).unflatten(1, GRID).permute(0, 4, 1, 2, 3)


def with_history(m, x, past):
    n = m.tokens(past, m.other).shape[1]
    both = torch.cat([m.tokens(past, m.other), m.tokens(x)], 1)
    return image(m, m.attend(both)[:, n:])


def with_itself(m, x, past):
    both = torch.cat([m.tokens(x), m.tokens(x, m.other)], 1)
    return image(m, m.attend(both)[:, :60])


def not_given_back(m, x, past):
    return m.attend(torch.cat([m.tokens(past, m.other), m.tokens(x)], 1))


def frames_joined(m, x, past):
    """The frames are put together before they become tokens, and all of them are given back."""
    video = m.tokens(torch.cat([past[:, :, :1], x[:, :, 1:]], 2))
    return image(m, m.attend(video))


def frames_joined_and_dropped(m, x, past):
    out = m.attend(m.tokens(torch.cat([past[:, :, :1], x], 2)))
    return m.v(out).unflatten(1, (5, 3, 5)).permute(0, 4, 1, 2, 3)[:, :, 1:]


@pytest.mark.parametrize(
    ("how", "past", "before"),
    [(with_history, 2, 30), (frames_joined, 2, 0), (frames_joined_and_dropped, 2, 15)],
    ids=["history", "joined", "joined-dropped"],
)
def test_the_video_that_is_given_back_is_found(how, past, before):
    check_video(only(how, LATENTS, torch.randn(1, 3, past, 6, 10)), before=before)


@pytest.mark.parametrize(
    ("how", "past"),
    [(with_history, 3), (with_itself, 2), (not_given_back, 4)],
    ids=["too-much-history", "the-same-grid-twice", "block-alone"],
)
def test_several_videos_in_doubt_stay_dense(how, past):
    site = only(how, LATENTS, torch.randn(1, 3, past, 6, 10))
    assert site.reason.code == "several_videos"


def test_a_longer_key_sequence_is_not_cross_attention():
    def cached(m, x, cache):
        tokens = m.tokens(x)
        return F.scaled_dot_product_attention(
            m.q(tokens)[:, None],
            torch.cat([cache, m.k(tokens)], 1)[:, None],
            torch.cat([cache, m.v(tokens)], 1)[:, None],
        )

    site = only(cached, LATENTS, torch.randn(1, 15, DIM))
    assert (site.role, site.grid) == ("video_self_attention", GRID)
    assert site.reason.code == "more_keys"


# Single operations


@pytest.mark.parametrize(
    "step",
    [
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: x - x.std(1, keepdim=True),
        lambda x: torch.maximum(x, -x),
        lambda x: torch.max(x, torch.zeros_like(x)),
        lambda x: x + x.var(dim=(0, 2), keepdim=True),
        lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
        lambda x: F.pad(x, (0, 0, 3, 2))[:, 3:-2],
        lambda x: x.masked_fill(x > 1, 0.0),
        lambda x: torch.cat([x[:, :1], x[:, 1:]], 1) + x,
        lambda x: x + torch.randn(1, 80, DIM)[:, :60],
        lambda x: x[:, torch.arange(60)],
        lambda x: torch.einsum("bsc,dc->bsd", x, torch.ones(DIM, DIM)),
        lambda x: F.glu(torch.cat([x, x], -1)),
    ],
    ids=[
        "normalize", "norm", "std", "maximum", "max", "var", "group-norm", "pad", "masked-fill", "cut", "learnt",
        "range", "einsum", "glu",
    ],
)  # fmt: skip
def test_operations_keep_the_grid(step):
    check_video(only(lambda m, x: m.attend(step(m.tokens(x))), LATENTS))


@pytest.mark.parametrize(
    "patch",
    [
        lambda x: F.avg_pool3d(x, (1, 2, 2)),
        lambda x: F.pixel_unshuffle(x.transpose(1, 2), 2).transpose(1, 2),
        lambda x: F.unfold(x.transpose(1, 2).flatten(0, 1), 2, stride=2).unflatten(0, (1, -1)).transpose(1, 2),
        lambda x: F.max_pool2d(x.transpose(1, 2).flatten(0, 1), 2).unflatten(0, (1, -1)).transpose(1, 2),
    ],
    ids=["avg-pool", "pixel-unshuffle", "unfold", "max-pool"],
)
def test_patches_without_a_convolution(patch):
    def how(m, x):
        x = patch(x).flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])

    check_video(only(how, LATENTS))
