"""Parts of the models in original_cross.py and original_joint.py: RoPE, attention modules, patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.models import _r

DIM, HEADS = 48, 2


def latents(batch, f, h, w, channels=4):
    return _r(batch, channels, f, 2 * h, 2 * w)


def seeded(cls, **kwargs):
    """A model with random weights that are the same in every run."""
    torch.manual_seed(0)
    return cls(**kwargs).eval()


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class Mlp(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))


class Attention(nn.Module):
    """Self- or cross-attention on [B, S, C]; `fused` = False writes the softmax out."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.fused = heads, True
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, context=None):
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        kv = self.kv(x if context is None else context)
        k, v = kv.reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


def optimized_attention(q, k, v, heads):
    """ComfyUI's signature: [B, S, H * D] in and out."""
    b, _, width = q.shape
    q, k, v = (t.view(b, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, width)


def rope_angles(length, dim):
    """Complex exponentials [length, dim / 2]."""
    angles = torch.outer(torch.arange(length), 1.0 / 10000 ** (torch.arange(0, dim, 2).double() / dim))
    return torch.polar(torch.ones_like(angles), angles)


def _grid_angles(freqs, f, h, w):
    table = torch.cat(
        [
            freqs[0][:f].view(f, 1, 1, -1).expand(f, h, w, -1),
            freqs[1][:h].view(1, h, 1, -1).expand(f, h, w, -1),
            freqs[2][:w].view(1, 1, w, -1).expand(f, h, w, -1),
        ],
        dim=-1,
    )
    return table.reshape(f * h * w, 1, -1)


def apply_rope_complex(x, grid_sizes, freqs, batched):
    """Wan's rope_apply: [B, S, H, D], a loop over samples, rows behind the grid left as they are."""
    c = x.shape[-1] // 2
    freqs = freqs.split([c - 2 * (c // 3), c // 3, c // 3], dim=1)
    if batched:
        rotated = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2)) * _grid_angles(freqs, *grid_sizes[0])
        return torch.view_as_real(rotated).flatten(3).type_as(x)
    output = []
    for i, (f, h, w) in enumerate(grid_sizes):
        n = f * h * w
        row = torch.view_as_complex(x[i, :n].double().reshape(n, x.shape[2], -1, 2))
        row = torch.view_as_real(row * _grid_angles(freqs, f, h, w)).flatten(2)
        output.append(torch.cat([row, x[i, n:]]))
    return torch.stack(output).type_as(x)


def rope_table_3d(f, h, w, dims):
    """cos and sin [f h w, sum(dims)], as Hunyuan's get_nd_rotary_pos_embed."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in (f, h, w)), indexing="ij")).flatten(1)
    angles = [torch.outer(p, 1.0 / 256 ** (torch.arange(0, d, 2) / d)) for p, d in zip(grid, dims, strict=True)]
    angles = torch.cat(angles, 1).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def sincos_3d(f, h, w, dim):
    """Sine positions [f h w, dim]."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in (f, h, w)), indexing="ij"), -1).reshape(-1, 3)
    return torch.sin(grid @ torch.arange(3 * dim).reshape(3, dim).float())


def patch_rows(x):
    """[B, C, 2 f, 2 h, 2 w] -> [B, f h w, 8 C], and (f, h, w)."""
    b, c, ft, ht, wt = x.shape
    f, h, w = ft // 2, ht // 2, wt // 2
    x = x.view(b, c, f, 2, h, 2, w, 2).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return x.reshape(b, f * h * w, 8 * c), (f, h, w)


def unpatchify(x, f, h, w):
    """[B, f h w, 16] -> [B, 4, f, 2 h, 2 w]."""
    x = x.reshape(x.shape[0], f, h, w, 2, 2, 4)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape[0], 4, f, 2 * h, 2 * w)
