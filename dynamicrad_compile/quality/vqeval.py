"""The loop score of VQeval (of LVSA), by its formulas, to stand beside ours (`loops`).

    score     = 100 (1 - 0.35 cycle - 0.25 duplicates - 0.20 flow - 0.20 autocorrelation)

With s(i, j) the cosine of the features of frames i and j, n frames and g = max(3, floor(n / 10)):

    cycle            b(L) is the mean of s(t, t + L), for L = 1 .. n / 2. How far the largest b(L) with L > g lies above
                     the mean of all, in their standard deviations, over 3; if they are all equal, (mean - 0.8) / 0.2.
                     At least 0.8 if the mean of all s(i, j), i != j, is above 0.95, at least 0.5 if it is above 0.90
    duplicates       3 x the share of pairs at least g frames apart with s > 0.97, at most 1
    flow             with the mean length of the optical flow from frame to frame (of about 30 pairs) as a series: share
                     p of its power, mean removed, at the strongest frequency; (p - 0.3) / 0.4
    autocorrelation  of the sizes of steps |f(t + 1) - f(t)|, mean removed: the largest at lags 3 .. n / 2; 0.8 where
                     all steps are equal

Each is clipped to 0..1. VQeval's features are embeddings of CLIP (`frame_features.clip_features`); without a model they
are coarse pixels, and the numbers are not VQeval's. Its flow is Farneback's, ours an iterative Lucas-Kanade, on the
mean of the channels, at most FLOW_PIXELS a side; give another one as `flow`. VQeval gives 80 to fewer than 10 frames
without looking at them; here that is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DynamicRadError
from ..optional import optional
from .frame_features import FrameFeatures, checked_features, coarse_features
from .metrics import check_clips

WEIGHTS = {"cycle": 0.35, "duplicates": 0.25, "flow": 0.20, "autocorrelation": 0.20}
MIN_FRAMES = 10
DUPLICATE = 0.97
ALL_SECONDS, SAMPLED_FPS = 5.0, 2.0
FLOW_PAIRS, FLOW_PIXELS = 30, 128
EQUAL = 1e-7
"""Standard deviation of cosines below which they are rounding noise."""

Flow = Callable[[Tensor, Tensor], float]
"""(frame, next frame), float [C, H, W] in 0..1 -> mean length of the optical flow between them."""


@dataclass(frozen=True)
class VQevalLoop:
    """The parts, each 0 (good) to 1, and the score, 0 to 100 (good); fp64 [N]. lag int64: of the strongest band."""

    cycle: Tensor
    duplicates: Tensor
    flow: Tensor
    autocorrelation: Tensor
    score: Tensor
    lag: Tensor


def sampled_frames(frames: int, fps: float) -> list[int]:
    """Which frames VQeval looks at: all of up to 5 s, else two a second, the first, the last and the middle one."""
    if frames < 1 or not fps > 0:
        raise DynamicRadError(f"expected at least one frame and a positive fps, got {frames} and {fps}.")
    if frames / fps <= ALL_SECONDS:
        return list(range(frames))
    return sorted({*range(0, frames, max(1, int(fps / SAMPLED_FPS))), frames - 1, frames // 2})


def enough_frames(frames: int, fps: float | None = None) -> bool:
    """Whether clips of so many frames can be scored."""
    return (frames if fps is None else len(sampled_frames(frames, fps))) >= MIN_FRAMES


def vqeval_loop(
    clips: Tensor, features: FrameFeatures = coarse_features, fps: float | None = None, flow: Flow | None = None
) -> VQevalLoop:
    """Parts and score of clips, float [N, F, C, H, W] in 0..1.

    fps  frames a second, by which VQeval samples long clips; None: all frames are looked at

    Raises DynamicRadError for fewer than 10 (sampled) frames, and without scikit-image where no `flow` is given.
    """
    clips = check_clips(clips)
    if fps is not None:
        clips = clips[:, sampled_frames(clips.shape[1], fps)]
    if not enough_frames(clips.shape[1]):
        raise DynamicRadError(f"VQeval's loop score needs {MIN_FRAMES} sampled frames, got {clips.shape[1]}.")
    found = checked_features(features, clips)
    alike = found @ found.mT
    cycle, lag = _cycle(alike)
    n = clips.shape[1]
    apart = torch.ones(n, n, dtype=torch.bool, device="cpu").triu(max(3, n // 10))
    parts = {
        "cycle": cycle,
        "duplicates": (3.0 * (alike[:, apart] > DUPLICATE).double().mean(1)).clamp(max=1.0),
        "flow": torch.tensor(
            [_periodic(clip, flow or lucas_kanade) for clip in clips], dtype=torch.float64, device="cpu"
        ),
        "autocorrelation": _autocorrelation(found.diff(dim=1).norm(dim=-1)),
    }
    total = torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum(0)
    return VQevalLoop(**parts, score=100.0 * (1.0 - total), lag=lag)


def _cycle(alike: Tensor) -> tuple[Tensor, Tensor]:
    """(cycle fp64 [N], lag int64 [N]) from cosines [N, F, F]."""
    n = alike.shape[1]
    bands = torch.stack([alike.diagonal(lag, 1, 2).mean(1) for lag in range(1, n // 2 + 1)], dim=1)
    mean, spread = bands.mean(1), bands.std(1, correction=0)
    first = max(3, n // 10)
    peak = bands[:, first:].max(1)
    by_peak = (peak.values - mean) / spread.clamp(min=EQUAL) / 3.0
    cycle = torch.where(spread > EQUAL, by_peak, (mean - 0.8) / 0.2).clamp(0.0, 1.0)
    overall = (alike.sum((1, 2)) - alike.diagonal(0, 1, 2).sum(1)) / (n * (n - 1))
    floor = torch.where(overall > 0.95, 0.8, torch.where(overall > 0.90, 0.5, 0.0))
    return torch.maximum(cycle, floor.double()), peak.indices + first + 1


def _periodic(clip: Tensor, flow: Flow) -> float:
    """How far the power of the lengths of flow lies at one frequency."""
    n = len(clip)
    lengths = np.array([flow(clip[i], clip[i + 1]) for i in range(0, n - 1, max(1, n // FLOW_PAIRS))])
    lengths = lengths - lengths.mean()
    if len(lengths) < 4 or lengths.std() < 1e-6:
        return 0.0
    power = np.abs(np.fft.rfft(lengths))[1:] ** 2
    return float(np.clip((power.max() / power.sum() - 0.3) / 0.4, 0.0, 1.0)) if power.sum() >= 1e-6 else 0.0


def lucas_kanade(first: Tensor, second: Tensor) -> float:
    """Mean length of the flow between two frames [C, H, W], in pixels of the frames as they are looked at."""
    skimage = optional("skimage.registration", "optical flow needs", "eval")
    scale = min(1.0, FLOW_PIXELS / max(first.shape[-2:]))
    size = tuple(max(1, round(extent * scale)) for extent in first.shape[-2:])
    pair = F.adaptive_avg_pool2d(torch.stack([first, second]).mean(1, keepdim=True), size)[:, 0].numpy()
    found = skimage.optical_flow_ilk(pair[0], pair[1], radius=5, num_warp=5)
    return float(np.sqrt((found**2).sum(0)).mean())


def _autocorrelation(steps: Tensor) -> Tensor:
    """fp64 [N]: the largest autocorrelation of the sizes of steps [N, F - 1], the first two lags apart."""
    centred = steps - steps.mean(1, keepdim=True)
    total = centred.square().sum(1)
    count = steps.shape[1]
    lags = range(3, count // 2 + 1)
    by_lag = torch.stack([(centred[:, : count - lag] * centred[:, lag:]).sum(1) for lag in lags], dim=1)
    peak = (by_lag / total.clamp(min=1e-8)[:, None]).amax(1).clamp(0.0, 1.0)
    return torch.where(total < 1e-8, 0.8, peak)
