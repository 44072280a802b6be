"""The axis trace on small graphs: whose tokens they are, several videos, operations that keep the grid."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.graphs import capture
from support.tokens import DIM, GRID, LATENTS, check_video, only, rotate, sites

from dynamicrad_compile.passes.axes.concatenation import same

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
    assert (site.role, site.reason.code) == ("unknown", "behind_graph_break")


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
    assert (site.role, site.grid, site.reason) == ("video_self_attention", GRID, None)
    assert (site.queries, tuple(site.text)) == ((15, 15 + math.prod(GRID)), (15, 0))


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


def test_positions_are_followed_through_a_product_with_frequencies():
    def rotated(x, positions):
        angles = (torch.linspace(0.1, 1, 8)[None, :, None] @ positions[:, None]).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(x * angles.cos(), x * angles.cos(), x)

    ((context, gm),) = capture(rotated, torch.randn(1, 2, 60, 8), torch.arange(60).float()[None])
    labels = {node.name: context.node_labels[node] for node in gm.graph.find_nodes(op="placeholder")}
    assert same(labels["l_x_"][2], labels["l_positions_"][1])


def test_every_second_row_is_not_the_first_half():
    """Queries are every second token, keys the first half, both rotated by one table: no self-attention."""

    def how(m, x):
        x = m.tokens(torch.cat([x, x], 2))
        q, k, v = rotate(m.q(x)[:, ::2]), rotate(m.k(x)[:, :60]), m.v(x)[:, :60]
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])

    assert only(how, LATENTS).reason.code == "arranged_otherwise"


def test_tokens_that_read_some_of_them_are_no_cross_attention():
    def how(m, x):
        x = m.tokens(x)
        return F.scaled_dot_product_attention(m.q(x)[:, None], m.k(x)[:, None, :15], m.v(x)[:, None, :15])

    site = only(how, LATENTS)
    assert (site.role, site.reason.code) == ("self_attention", "some_keys")


@pytest.mark.parametrize(
    "rows", [lambda z, index: z[:, ::2], lambda z, index: z[:, index]], ids=["every second", "picked"]
)
def test_tokens_that_read_a_choice_of_them_are_no_cross_attention(rows):
    def how(m, x, index):
        x = m.tokens(x)
        return F.scaled_dot_product_attention(m.q(x)[:, None], *(rows(z, index)[:, None] for z in (m.k(x), m.v(x))))

    assert only(how, LATENTS, torch.randperm(60)[:20]).reason.code == "arranged_otherwise"
