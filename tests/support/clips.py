"""Clips made by formulas: one that keeps going and those that fail on purpose, float [1, F, 3, H, W] in 0..1."""

from __future__ import annotations

import torch


def moving(frames=32, speed=0.7, size=24):
    """A soft-edged square that crosses a textured background and never comes back."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    background = 0.4 + 0.1 * torch.sin(0.7 * x + 0.3 * y)
    time = torch.arange(frames)[:, None, None]
    edge = torch.maximum((x - speed * time).abs(), (y - size / 2).abs()) - 4
    cover = (0.5 - edge / 3).clamp(0, 1)[:, None]
    color = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    return (background + cover * (color - background))[None]


def looping(period=8, frames=32):
    return moving(period, speed=2.5).repeat(1, frames // period, 1, 1, 1)


def frozen(frames=32):
    return moving(1).repeat(1, frames, 1, 1, 1)


def noisy(clip, sigma, seed=0):
    return (clip + sigma * torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def back_and_forth(frames=32):
    """Half of a clip, and the same backwards."""
    there = moving(frames // 2, speed=1.4)
    return torch.cat([there, there.flip(1)], dim=1)


def in_turn(frames=32):
    """Two pictures, one after the other."""
    return torch.cat([moving(1), moving(1).roll(9, -1)], dim=1).repeat(1, frames // 2, 1, 1, 1)


def noise(frames=32):
    """Frames that have nothing to do with each other."""
    return torch.rand(1, frames, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def half_frozen(frames=32):
    """A clip that stops half way."""
    there = moving(frames // 2)
    return torch.cat([there, there[:, -1:].repeat(1, frames - frames // 2, 1, 1, 1)], dim=1)
