"""Timestep, prompt and mask among a graph's inputs: tiny models with and without them, what the zoo's models have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from zoo.conditions import CONDITIONS


def check_conditions(name, captured):
    """The one graph of the zoo's model `name` knows its timestep, prompt and mask."""
    if name in CONDITIONS:
        ((context, _),) = captured
        found = (context.conditions.timestep, context.conditions.prompt, context.conditions.mask)
        names = [node and node.name.replace("l_kwargs_", "l_")[2:-1] for node in found]
        assert names == list(CONDITIONS[name])


class Model(nn.Module):
    """Latents with self-attention, a prompt by cross-attention, sinusoidal embeddings of two scalars."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(3, 8, (1, 2, 2), (1, 2, 2))
        self.q, self.k, self.v, self.time, self.text = (nn.Linear(8, 8) for _ in range(5))

    def embed(self, scalar):
        angles = scalar.float().reshape(-1)[:, None] * torch.exp(-torch.arange(4.0))
        return self.time(torch.cat([angles.cos(), angles.sin()], -1))[:, None]

    def attend(self, x, y):
        return F.scaled_dot_product_attention(self.q(x)[:, None], self.k(y)[:, None], self.v(y)[:, None])[:, 0]

    def forward(self, a, b, c, d, e):
        x = self.patch(a).flatten(2).transpose(1, 2)
        rope = (e.float()[:, None] * torch.arange(8.0)).cos()
        x = x + self.embed(b)
        x = self.attend(x * rope, x * rope)
        return self.attend(x, self.text(c)) * d[..., None].sum()


class NoTime(Model):
    def forward(self, a, c):
        x = self.patch(a).flatten(2).transpose(1, 2)
        return self.attend(self.attend(x, x), self.text(c))
