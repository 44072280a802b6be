"""A patch embedding with projections, whose forward a test gives: small graphs for the axis trace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from support.graphs import capture, sites_of

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


def sites(how, *args, grid=None):
    return sites_of(capture(Tokens(how), *args, grid=grid))


def only(how, *args, grid=None):
    (site,) = sites(how, *args, grid=grid)
    return site


def rotate(x):
    """RoPE of one table, made in the graph."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")).flatten(1).sum(0)
    return x * grid.float().cos()[None, :, None]


def check_video(site, before=0, after=0):
    assert (site.role, site.grid, tuple(site.text)) == ("video_self_attention", GRID, (before, after))
    assert site.reason is None
