"""Query, key and value cut out of one fused projection: the same tokens, in every usual spelling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import capture, sites_of
from torch import nn

GRID, HEADS, HEAD_DIM, DIM = (4, 3, 5), 2, 8, 16  # 60 tokens
TOKENS = 60


class Block(nn.Module):
    """A patch embedding, a fused projection and attention; `how` gives query, key and value of the tokens."""

    def __init__(self, how, columns=3 * HEADS * HEAD_DIM):
        super().__init__()
        self.how = how
        self.patch = nn.Conv3d(3, DIM, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(DIM, columns)
        self.query, self.pair = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)
        self.conv = nn.Conv1d(DIM, 3 * DIM, 1)
        self.weight = nn.Parameter(torch.randn(3, HEADS, DIM, HEAD_DIM))
        self.norm = nn.RMSNorm(HEAD_DIM)

    def forward(self, latents):
        tokens = self.patch(latents).flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(*self.how(self, tokens), enable_gqa=self.qkv.out_features == 6 * HEAD_DIM)


def heads(x):
    """[B, S, H D] -> [B, H, S, D]."""
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def five(m, x):
    """[B, S, 3, H, D]."""
    return m.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM))


def rotated(x):
    """Rotate-half RoPE with tables made in the graph; x [..., S, D]."""
    angle = torch.arange(float(TOKENS))[:, None]
    return x * angle.cos() + torch.cat([-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]], -1) * angle.sin()


def pairs(x):
    """Interleaved RoPE; x [..., S, D]."""
    angle = torch.arange(float(TOKENS))[:, None]
    return x * angle.cos() + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * angle.sin()


def columns(m, x):
    y = m.qkv(x)
    return (heads(z) for z in (y[..., :DIM], y[..., DIM : 2 * DIM], y[..., 2 * DIM :]))


def narrow(m, x):
    return (heads(m.qkv(x).narrow(-1, i * DIM, DIM)) for i in range(3))


def every_third(m, x):
    return (heads(m.qkv(x)[..., i::3]) for i in range(3))


def tensor_split(m, x):
    return (heads(z) for z in m.qkv(x).tensor_split(3, -1))


def selected(m, x):
    y = five(m, x)
    return (y[:, :, i].transpose(1, 2) for i in range(3))


def indexed(m, x):
    return (five(m, x).index_select(2, torch.tensor([i])).squeeze(2).transpose(1, 2) for i in range(3))


def split_and_squeezed(m, x):
    return (z.squeeze(2).transpose(1, 2) for z in five(m, x).split(1, 2))


def permuted(m, x):
    y = five(m, x).permute(2, 0, 3, 1, 4)
    return y[0], y[1], y[2]


def heads_outside(m, x):
    y = m.qkv(x).unflatten(-1, (HEADS, 3, HEAD_DIM))
    return (y[:, :, :, i].transpose(1, 2) for i in range(3))


def sequence_first(m, x):
    y = m.qkv(x.transpose(0, 1)).unflatten(-1, (HEADS, 3 * HEAD_DIM))
    return (z.permute(1, 2, 0, 3) for z in y.chunk(3, -1))


def three_times_the_heads(m, x):
    y = m.qkv(x).unflatten(-1, (3 * HEADS, HEAD_DIM))
    return (z.transpose(1, 2) for z in (y[:, :, :HEADS], y[:, :, HEADS : 2 * HEADS], y[:, :, 2 * HEADS :]))


def innermost(m, x):
    y = m.qkv(x).unflatten(-1, (HEADS, HEAD_DIM, 3))
    return (y[..., i].transpose(1, 2) for i in range(3))


def batch_folded(m, x):
    y, b = five(m, x).permute(2, 0, 3, 1, 4).flatten(0, 1), x.shape[0]
    return y[:b], y[b : 2 * b], y[2 * b :]


def packed_rows(m, x):
    y = m.qkv(x.flatten(0, 1)).view(-1, 3, HEADS, HEAD_DIM)
    return (z.unflatten(0, (x.shape[0], -1)).transpose(1, 2) for z in y.unbind(1))


def grouped(m, x):
    y = m.qkv(x).unflatten(-1, (6, HEAD_DIM)).transpose(1, 2)
    return y[:, :4], y[:, 4:5], y[:, 5:]


def query_and_pair(m, x):
    k, v = m.pair(x).unflatten(-1, (2, HEADS, HEAD_DIM)).unbind(2)
    return heads(m.query(x)), k.transpose(1, 2), v.transpose(1, 2)


def one_weight(m, x):
    return torch.einsum("bsc,khcd->kbhsd", x, m.weight).unbind(0)


def convolved(m, x):
    return (z.unflatten(1, (HEADS, HEAD_DIM)).transpose(-1, -2) for z in m.conv(x.transpose(1, 2)).chunk(3, 1))


def normed_together(m, x):
    y = five(m, x)
    qk = m.norm(y[:, :, :2])
    return qk[:, :, 0].transpose(1, 2), qk[:, :, 1].transpose(1, 2), y[:, :, 2].transpose(1, 2)


def normed_query(m, x):
    q, k, v = permuted(m, x)
    return m.norm(q), k, v


def rotated_together(join, rope):
    def how(m, x):
        q, k, v = query_and_pair(m, x)
        qk = {"stack": torch.stack, "batch": torch.cat, "heads": lambda z: torch.cat(z, 1)}[join]([q, k])
        return (*(rope(qk).chunk(2, 1) if join == "heads" else rope(qk).unflatten(0, (2, -1)).squeeze(1)
                  if join == "stack" else rope(qk).chunk(2)), v)  # fmt: skip

    how.__name__ = f"rotated-{join}-{rope.__name__}"
    return how


def put_together_again(m, x):
    return (z.transpose(1, 2) for z in torch.stack([z.transpose(1, 2) for z in query_and_pair(m, x)], 2).unbind(2))


def head_by_head(m, x):
    y = five(m, x)
    return (torch.stack([y[:, :, i, h] for h in range(HEADS)], 1) for i in range(3))


def padded_features(m, x):
    return (z.transpose(1, 2) for z in F.pad(five(m, x), (0, 4)).unbind(2))


SPELLINGS = [
    columns, narrow, every_third, tensor_split, selected, indexed, split_and_squeezed, permuted, heads_outside,
    sequence_first, three_times_the_heads, innermost, batch_folded, packed_rows, grouped, query_and_pair, one_weight,
    convolved, normed_together, normed_query, put_together_again, head_by_head, padded_features,
    *(rotated_together(join, rope) for join in ("stack", "batch", "heads") for rope in (rotated, pairs)),
]  # fmt: skip


@pytest.mark.parametrize("how", SPELLINGS, ids=lambda f: f.__name__)
def test_fused_projections_are_one_video(how):
    model = Block(how, 6 * HEAD_DIM if how is grouped else 3 * HEADS * HEAD_DIM)
    for batch in (1, 2):
        torch._dynamo.reset()
        (site,) = sites_of(capture(model, torch.randn(batch, 3, 4, 6, 10)))
        assert (site.role, site.grid, site.reason) == ("video_self_attention", GRID, None)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


OUTSIDE = {
    "columns": (lambda y: attend(*(heads(z) for z in y.chunk(3, -1))), (2, TOKENS, 3 * DIM)),
    "dimension": (
        lambda y: attend(*(z.transpose(1, 2) for z in y.unbind(2))),
        (2, TOKENS, 3, HEADS, HEAD_DIM),
    ),
    "stacked": (lambda y: attend(*y), (3, 2, HEADS, TOKENS, HEAD_DIM)),
    "rotated": (
        lambda y: attend(*(y[i] * torch.arange(float(TOKENS))[:, None] for i in range(2)), y[2]),
        (3, 2, HEADS, TOKENS, HEAD_DIM),
    ),
}


@pytest.mark.parametrize("name", list(OUTSIDE))
def test_a_projection_outside_the_graph_is_one_video(name):
    how, shape = OUTSIDE[name]
    (site,) = sites_of(capture(how, torch.randn(shape), grid=GRID))
    assert (site.role, site.grid, site.reason) == ("video_self_attention", GRID, None)


@pytest.mark.parametrize(
    "how",
    [
        lambda y: attend(y[1], y[0], y[2]),
        lambda y: attend(y[0], y[1], y[1]),
        lambda y: attend(*y.flatten(0, 1).chunk(3, 0)),  # may be three videos in a batch
        lambda y: attend(*y.permute(1, 2, 0, 3, 4).flatten(2, 3).chunk(3, 2)),  # three pieces of one sequence
    ],
    ids=["other-order", "two-of-three", "batch", "sequence"],
)
def test_other_thirds_are_not_taken_for_one_video(how):
    (site,) = sites_of(capture(how, torch.randn(3, 2, HEADS, TOKENS, HEAD_DIM), grid=GRID))
    assert site.role == "cross_attention"


def guided(latents, text, patch):
    """Both halves of a batch are the same latents; what each took from its prompt differs."""
    x = patch(torch.cat([latents, latents])).flatten(2).transpose(1, 2)
    a, b = (x + attend(x[:, None], text[:, None], text[:, None])[:, 0]).chunk(2)
    return attend(a[:, None], b[:, None], b[:, None])


def test_two_halves_of_a_guided_batch_are_different_tokens():
    patch = nn.Conv3d(3, DIM, (1, 2, 2), (1, 2, 2))
    sites = sites_of(capture(guided, torch.randn(1, 3, 4, 6, 10), torch.randn(2, 7, DIM), patch))
    assert [site.role for site in sites] == ["cross_attention"] * 2
