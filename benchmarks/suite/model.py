"""A video diffusion transformer of the shape of Wan2.1-14B in plain PyTorch, with random weights.

As the published model card describes it: width 5120, 40 heads of 128, feed-forward 13824, 512 text tokens of 4096
features, RMS norm of queries and keys, rotary positions over frame, row and column, six modulations of the timestep.
Only the number of layers differs (40 there). Inputs are latents [B, 16, F, 2 H, 2 W], patches are 1 x 2 x 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of the transformer."""

    heads: int = 40
    head_dim: int = 128
    ffn: int = 13824
    text_dim: int = 4096
    text_tokens: int = 512
    layers: int = 2

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_dim

    def attention_share(self, tokens: int) -> float:
        """Share of self-attention in the FLOPs of a dense block of `tokens` tokens."""
        w, text = self.width, self.text_tokens
        attention = 4 * tokens**2 * w
        projections = 2 * tokens * w * (4 * w + 2 * w + 2 * self.ffn) + 2 * text * w * 2 * w
        cross = 4 * tokens * text * w
        return attention / (attention + projections + cross)


WAN_14B, TINY = Shape(), Shape(heads=2, head_dim=32, ffn=128, text_dim=48, text_tokens=16)


def rope_tables(grid: tuple[int, int, int], head_dim: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [1, tokens, 1, head_dim / 2] of rotary positions: a share of the features for each axis."""
    third = head_dim // 6
    halves = (head_dim // 2 - 2 * third, third, third)
    angles = []
    for axis, (size, half) in enumerate(zip(grid, halves, strict=True)):
        rate = 1.0 / 10000.0 ** (torch.arange(half, device=device) / half)
        angle = torch.arange(size, device=device)[:, None] * rate
        view = [1, 1, 1, half]
        view[axis] = size
        angles.append(angle.view(view).expand(*grid, half))
    whole = torch.cat(angles, -1).reshape(1, -1, 1, head_dim // 2)
    return whole.cos(), whole.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, H, D] with its pairs of features turned by the angles."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self- or cross-attention with normalised queries and keys."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, w = shape.heads, shape.width
        self.q, self.k, self.v, self.out = (nn.Linear(w, w) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(w, eps=1e-6), nn.RMSNorm(w, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [B, S, W], context [B, T, W]; rope for self-attention."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer."""

    def __init__(self, shape: Shape):
        super().__init__()
        w = shape.width
        self.attn, self.cross = Attention(shape), Attention(shape)
        self.norm_cross = nn.LayerNorm(w)
        self.ffn = nn.Sequential(nn.Linear(w, shape.ffn), nn.GELU(approximate="tanh"), nn.Linear(shape.ffn, w))
        self.modulation = nn.Parameter(torch.randn(1, 6, w) / w**0.5)

    def forward(self, x: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, W], text [B, T, W], time [B, 6, W]; tables of rope_tables."""
        shift, scale, gate, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(2).unbind(1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        x = x + self.attn(y, y, (cos, sin)) * gate
        x = x + self.cross(self.norm_cross(x), text, None)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + self.ffn(y) * gate2


class VideoTransformer(nn.Module):
    """The whole model; a forward is one denoising step."""

    def __init__(self, shape: Shape):
        super().__init__()
        w = shape.width
        self.shape = shape
        self.patch = nn.Conv3d(LATENT_CHANNELS, w, (1, 2, 2), (1, 2, 2))
        self.text = nn.Sequential(nn.Linear(shape.text_dim, w), nn.GELU(approximate="tanh"), nn.Linear(w, w))
        self.time = nn.Sequential(nn.Linear(256, w), nn.SiLU(), nn.Linear(w, 6 * w))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = nn.Linear(w, 4 * LATENT_CHANNELS)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """latents [B, 16, F, 2 H, 2 W], timestep [B], text [B, T, text_dim] -> like latents."""
        x = self.patch(latents)
        grid = (x.shape[2], x.shape[3], x.shape[4])
        x = x.flatten(2).transpose(1, 2)
        rates = 1.0 / 10000.0 ** (torch.arange(128, device=x.device) / 128)
        angle = timestep.float()[:, None] * rates
        time = self.time(torch.cat((angle.cos(), angle.sin()), -1).to(x.dtype)).unflatten(-1, (6, -1))
        text = self.text(text)
        cos, sin = rope_tables(grid, self.shape.head_dim, x.device)
        for block in self.blocks:
            x = block(x, text, time, cos, sin)
        x = self.head(F.layer_norm(x, x.shape[-1:]))
        x = x.unflatten(1, grid).unflatten(-1, (LATENT_CHANNELS, 2, 2))  # [B, F, H, W, 16, 2, 2]
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
