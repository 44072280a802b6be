"""Timestep, prompt and mask are found among a graph's inputs, whatever they are called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import capture, make
from torch import nn
from zoo_more import ZOO_MORE

PROMPT = "encoder_hidden_states"
CASES = {
    "wan_t2v": ("timestep", PROMPT, None),
    "wan_i2v": ("timestep", PROMPT, None),  # beside image tokens
    "wan22_ti2v": ("timestep", PROMPT, None),  # a timestep for each token
    "hunyuan_video": ("timestep", PROMPT, "encoder_attention_mask"),  # beside guidance
    "cogvideox_5b": ("timestep", PROMPT, None),
    "cogvideox_15": ("timestep", PROMPT, None),  # beside ofs
    "ltx": ("timestep", PROMPT, "encoder_attention_mask"),
    "allegro": ("timestep", PROMPT, "encoder_attention_mask"),
    "cosmos1": ("timestep", PROMPT, "attention_mask"),
    "cosmos2": ("timestep", PROMPT, None),  # [B, 1, frames, 1, 1]
    "kandinsky5": ("timestep", PROMPT, None),
    "skyreels_v2_df": ("timestep", PROMPT, None),  # a timestep for each frame, beside fps
    "anyflow": ("timestep", PROMPT, None),  # beside r_timestep
}


@pytest.mark.parametrize("name", CASES)
def test_conditions_of_real_models(name):
    model, kwargs, *_ = ZOO_MORE[name]() if name in ZOO_MORE else make(name)
    ((context, _),) = capture(model, **kwargs)
    found = context.conditions
    names = [None if node is None else node.name for node in (found.timestep, found.prompt, found.mask)]
    assert [n and n.replace("l_kwargs_", "l_")[2:-1] for n in names] == list(CASES[name])


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


def test_names_are_not_needed():
    inputs = (
        torch.randn(1, 3, 4, 6, 10),
        torch.tensor([500]),
        torch.randn(1, 7, 8),
        torch.ones(1, 7),
        torch.arange(60),
    )
    ((context, _),) = capture(Model(), *inputs)
    found = context.conditions
    assert [found.timestep.name, found.prompt.name, found.mask.name] == ["l_b_", "l_c_", "l_d_"]
    assert found.embedding_dim == 8


class NoTime(Model):
    def forward(self, a, c):
        x = self.patch(a).flatten(2).transpose(1, 2)
        return self.attend(self.attend(x, x), self.text(c))


def test_what_is_not_there_is_not_found():
    ((context, _),) = capture(NoTime(), torch.randn(1, 3, 4, 6, 10), torch.randn(1, 7, 8))
    assert context.conditions.timestep is None
    assert context.conditions.mask is None
    assert context.conditions.prompt.name == "l_c_"
