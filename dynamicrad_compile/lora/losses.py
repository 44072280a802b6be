"""Noise levels, what the model should say, and the loss on held-out clips.

Flow matching as in diffusers' training: with noise level s in 0..1 the model sees x = (1 - s) clip + s noise at
timestep scale * s and should say v = noise - clip. Models that count the other way (`timestep_rises`) get
scale * (1 - s) and should say clip - noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Batch, Clips, collate
from .settings import Loss

Call = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""A model's prediction [B, C, F, H, W] from noisy latents, timestep [B] and conditions."""


@dataclass(frozen=True)
class Question:
    """What the model is asked, and the right answer: noisy and target [B, C, F, H, W], timestep fp32 [B]."""

    noisy: Tensor
    timestep: Tensor
    target: Tensor


def ask(batch: Batch, levels: Tensor, noise: Tensor, loss: Loss) -> Question:
    """The question at noise levels fp32 [B] with `noise` like the latents."""
    clip = batch.latents.float()
    s = levels.to(clip.device)[:, None, None, None, None]
    noise = noise.to(clip.device)
    shown = 1.0 - levels if loss.timestep_rises else levels
    target = clip - noise if loss.timestep_rises else noise - clip
    noisy = ((1.0 - s) * clip + s * noise).to(batch.latents.dtype)
    return Question(noisy, (loss.timestep_scale * shown).to(clip.device), target)


def draw_levels(count: int, loss: Loss, generator: torch.Generator, dense_level: float | None = None) -> Tensor:
    """Noise levels fp32 [count], evenly apart before they are shifted as the scheduler's.

    Where inference is dense above `dense_level` (option dense_timestep), one call can't be both: its levels are all on
    the side on which the first one is.
    """
    levels = shifted(
        (
            torch.rand((), generator=generator, dtype=torch.float32, device="cpu")
            + torch.arange(count, dtype=torch.float32, device="cpu") / count
        )
        % 1.0,
        loss.shift,
    )
    while dense_level is not None and bool(((levels >= dense_level) != (levels[0] >= dense_level)).any()):
        other = (levels >= dense_level) != (levels[0] >= dense_level)
        levels[other] = shifted(
            torch.rand(int(other.sum()), generator=generator, dtype=torch.float32, device="cpu"), loss.shift
        )
    return levels


def shifted(u: Tensor, shift: float) -> Tensor:
    """s u / (1 + (s - 1) u) of u in 0..1, as FlowMatchEulerDiscreteScheduler shifts its noise levels."""
    return shift * u / (1.0 + (shift - 1.0) * u)


@torch.no_grad()
def held_out_losses(
    call: Callable[[Batch, Question], Tensor],
    clips: Clips,
    loss: Loss,
    count: int,
    levels: int = 1,
    seed: int = 0,
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
) -> Tensor:
    """Flow-matching loss fp64 [count, levels] of the first `count` clips, each at `levels` noise levels.

    Clips, levels and noise are the same for every model, so differences of two results are paired. The levels of a clip
    are spread evenly over 0..1 before the shift, and the clips stand between each other's. `prepare` moves a batch to
    device and dtype.
    """
    found = torch.zeros(count, levels, dtype=torch.float64, device="cpu")
    for i in range(count):
        batch = prepare(collate([clips[i]]))
        for j in range(levels):
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + 1009 * i + j)
            u = torch.tensor([(j + ((i + 0.5) * 0.618034) % 1.0) / levels], dtype=torch.float32, device="cpu")
            noise = torch.randn(batch.latents.shape, generator=generator, dtype=torch.float32, device="cpu")
            question = ask(batch, shifted(u, loss.shift), noise, loss)
            found[i, j] = (call(batch, question).float() - question.target).square().mean().double()
    return found


def mean_and_error(losses: Tensor) -> tuple[float, float]:
    """Mean of losses [clips, levels] and its standard error over clips."""
    by_clip = losses.mean(1)
    return float(by_clip.mean()), float(by_clip.std() / len(by_clip) ** 0.5) if len(by_clip) > 1 else float("nan")
