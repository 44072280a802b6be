"""The tiny model as something that `dynamicrad eval` can evaluate, with clips that it was never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import DynamicRadError
from ..subject import Subject
from . import data
from .model import CHECKPOINT, load, sample, size_of

PATCH = 4  # pixels of a token, both sides


def subject(checkpoint: str | Path = CHECKPOINT, steps: int = 10, guidance_scale: float = 3.0) -> Subject:
    """The trained model of a checkpoint, sampled in `steps` steps; prompts are held-out captions, regimes in turn."""
    try:
        transformer, text = load(checkpoint)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DynamicRadError(f"{checkpoint} is no checkpoint of the tiny video model: {error}") from None
    path = Path(checkpoint)
    weights = path / "model.safetensors" if path.is_dir() else path
    size = size_of(path)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]

    def generate(model: Any, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        first = seeds[0]
        if list(seeds) != list(range(first, first + len(seeds))):
            return torch.cat([generate(model, [p], [s]) for p, s in zip(prompts, seeds, strict=True)])
        video = sample(model, text, prompts, seed=first, steps=steps, guidance_scale=guidance_scale, size=(size, size))
        return (video.transpose(1, 2) + 1) / 2

    def real(count: int) -> torch.Tensor:
        videos, _ = data.batch(data.HELD_OUT_SEED, range(count), size=size)
        return (videos.transpose(1, 2) + 1) / 2

    grid = (data.FRAMES, size // PATCH, size // PATCH)
    name = f"tiny video {digest}, {steps} steps, guidance {guidance_scale:g}"
    return Subject(name, transformer, generate, grid, prompts(30), real)


def prompts(count: int) -> list[str]:
    """Held-out captions: low, mid and high motion in turn."""
    by_regime = [data.captions(-(-count // 3), regime=regime) for regime in data.REGIMES]
    return [caption for three in zip(*by_regime, strict=True) for caption in three][:count]
