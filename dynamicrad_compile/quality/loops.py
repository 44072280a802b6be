"""Does a long clip loop or freeze? A score from its pixels alone, in the spirit of VQeval's loop score.

VQeval (of LVSA; its own formulas are in `vqeval`) compares CLIP embeddings of frames. Here frames are compared as they
are, coarse pixels of at most 16 x 16, so nothing is downloaded, and each of the four parts is 0 for a clip that keeps
going somewhere new:

    repetition   max over lags L of 1 - d(L) / max of d(l) for l < L, with d(L) the distance of frames L apart (root
                 mean square, mean over t) and L from max(3, n / 10) to n - 2: the clip went away and came back.
                 A drift that only ever grows gives 0, an exact loop 1
    duplicates   3 x the share of pairs of frames that are nearer than DUPLICATE, at most 1
    periodicity  share of the temporal power (mean removed, summed over pixels) at the multiples of a frequency k >= 2
                 cycles a clip, less what white noise would have there, best k: an exact loop of n / k frames gives 1
    stillness    share of steps with a change below STILL

    score = 100 (1 - 0.35 repetition - 0.25 duplicates - 0.20 periodicity - 0.20 stillness)

A still clip repeats itself at any lag and has no power at all: repetition and periodicity are at least its stillness.
So 100 is a clip that never comes back, 0 a frozen one. An honest back and forth (a bouncing ball) costs points too:
compare with the dense clip or with real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .frame_features import coarse
from .metrics import check_clips

DUPLICATE = 0.01  # root mean square, in units of the value range: 2.5 of 255
STILL = 0.004  # 1 of 255
WEIGHTS = {"repetition": 0.35, "duplicates": 0.25, "periodicity": 0.20, "stillness": 0.20}
MIN_FRAMES = 8


@dataclass(frozen=True)
class LoopScore:
    """The parts, each 0 (good) to 1, and the score, 0 to 100 (good); fp64 [N]. lag int64: of the strongest return."""

    repetition: Tensor
    duplicates: Tensor
    periodicity: Tensor
    stillness: Tensor
    score: Tensor
    lag: Tensor


def loop_score(clips: Tensor) -> LoopScore:
    """Parts and score of clips, float [N, F, C, H, W] in 0..1, at least MIN_FRAMES frames. Raises DynamicRadError."""
    clips = check_clips(clips, frames=MIN_FRAMES)
    pixels = coarse(clips).flatten(2)
    n = pixels.shape[1]
    distance = torch.cdist(pixels, pixels) / pixels.shape[2] ** 0.5
    pairs = torch.triu(torch.ones(n, n, dtype=torch.bool, device="cpu"), 1)
    duplicates = (3.0 * (distance[:, pairs] < DUPLICATE).double().mean(1)).clamp(max=1.0)
    still = (distance.diagonal(1, 1, 2) < STILL).double().mean(1)
    repetition, lag = _repetition(distance)
    repetition = torch.maximum(repetition, still)
    periodicity = torch.maximum(_periodicity(pixels), still)
    parts = {"repetition": repetition, "duplicates": duplicates, "periodicity": periodicity, "stillness": still}
    total = sum(
        (WEIGHTS[name] * part for name, part in parts.items()),
        torch.zeros(len(clips), dtype=torch.float64, device="cpu"),
    )
    return LoopScore(**parts, score=100.0 * (1.0 - total), lag=lag)


def _repetition(distance: Tensor) -> tuple[Tensor, Tensor]:
    """(depth fp64 [N], lag int64 [N]) of the strongest return, from distances [N, F, F]."""
    n = distance.shape[1]
    by_lag = torch.stack([distance.diagonal(lag, 1, 2).mean(1) for lag in range(n - 1)], dim=1)
    away = by_lag.cummax(1).values
    lags = torch.arange(max(3, -(-n // 10)), n - 1, device="cpu")
    depth = 1.0 - by_lag[:, lags] / away[:, lags - 1].clamp(min=1e-12)
    depth = torch.where(away[:, lags - 1] > STILL, depth, 0.0)
    best = depth.max(1)
    return best.values.clamp(0.0, 1.0), lags[best.indices]


def _periodicity(pixels: Tensor) -> Tensor:
    """fp64 [N]: how far the power lies on one comb of frequencies."""
    centred = pixels - pixels.mean(1, keepdim=True)
    power = torch.fft.rfft(centred, dim=1).abs().square().sum(2)[:, 1:]
    total = power.sum(1)
    result = torch.zeros(len(pixels), dtype=torch.float64, device="cpu")
    top = power.shape[1]
    for k in range(2, top // 2 + 1):
        chance = len(range(k, top + 1, k)) / top
        share = power[:, k - 1 :: k].sum(1) / total.clamp(min=1e-30)
        result = torch.maximum(result, (share - chance) / (1.0 - chance))
    return torch.where(total > 1e-12, result.clamp(0.0, 1.0), 0.0)
