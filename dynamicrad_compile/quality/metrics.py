"""Numbers of one clip, alone or against a reference clip. Clips are float [N, F, C, H, W] in 0..1; results fp64 [N]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DynamicRadError
from ..optional import optional

# PSNR of two equal clips, where the formula gives infinity.
MAX_PSNR = 100.0
# Pixels of the window of SSIM; frames can't be smaller.
SSIM_PIXELS = 11


def check_clips(clips: Tensor, name: str = "clips", frames: int = 1) -> Tensor:
    """The clips as fp64. Raises DynamicRadError if they are not float [N, F, C, H, W] with so many frames, finite."""
    if not isinstance(clips, Tensor) or clips.dim() != 5 or not clips.is_floating_point():
        found = list(clips.shape) if isinstance(clips, Tensor) else type(clips).__name__
        raise DynamicRadError(f"{name} must be a float tensor [N, F, C, H, W] with values in 0..1, got {found}.")
    if clips.shape[1] < frames:
        raise DynamicRadError(f"{name} must have at least {frames} frames for this metric, got {clips.shape[1]}.")
    if not bool(torch.isfinite(clips).all()):
        raise DynamicRadError(f"{name} hold values that are not finite: the model or its sampler is broken.")
    return clips.detach().cpu().double()


def _pair(clips: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if clips.shape != reference.shape:
        raise DynamicRadError(f"clips and reference must agree, got {list(clips.shape)} and {list(reference.shape)}.")
    return check_clips(clips), check_clips(reference, "reference")


def rmse(clips: Tensor, reference: Tensor) -> Tensor:
    """Root of the mean squared difference over a whole clip, in units of the value range."""
    a, b = _pair(clips, reference)
    return (a - b).square().flatten(1).mean(1).sqrt()


def psnr(clips: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a whole clip, for a peak of 1; at most MAX_PSNR."""
    return (-20.0 * rmse(clips, reference).log10()).clamp(max=MAX_PSNR)


def ssim(clips: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004: Gaussian window of sigma 1.5), mean over frames; 1 for equal clips.

    Raises DynamicRadError without scikit-image, or for frames smaller than its window of 11.
    """
    structural_similarity = optional("skimage.metrics", "SSIM needs", "eval").structural_similarity
    a, b = _pair(clips, reference)
    if min(a.shape[-2:]) < SSIM_PIXELS:
        size = f"{SSIM_PIXELS}x{SSIM_PIXELS}"
        raise DynamicRadError(f"SSIM needs frames of at least {size} pixels, got {list(a.shape[-2:])}.")
    settings: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    result = torch.empty(len(a), dtype=torch.float64, device="cpu")
    for n in range(len(a)):
        frames = zip(a[n].numpy(), b[n].numpy(), strict=True)
        result[n] = np.mean(
            [structural_similarity(x, y, data_range=1.0, channel_axis=0, **settings) for x, y in frames]
        )
    return result


def steps(clips: Tensor) -> Tensor:
    """fp64 [N, F - 1]: root mean square of the change from each frame to the next."""
    clips = check_clips(clips, frames=2)
    return clips.diff(dim=1).square().flatten(2).mean(2).sqrt()


def motion(clips: Tensor) -> Tensor:
    """Energy of the frame differences: root of the mean squared change over all steps. 0 is a still picture."""
    return steps(clips).square().mean(1).sqrt()


def motion_ratio(clips: Tensor, reference: Tensor) -> Tensor:
    """Energy of the frame differences over the reference's; 1 is as much change, 0 is frozen, NaN if both are still."""
    a, b = _pair(clips, reference)
    return motion(a).square() / motion(b).square()


def flicker(clips: Tensor) -> Tensor:
    """Energy of second differences in time over that of first ones, no optical flow needed.

        sum |x[t+1] - 2 x[t] + x[t-1]|^2 / sum |x[t+1] - x[t]|^2       (both as means)

    0 for a linear cross-fade, 3 for frames that are independent noise, 4 for two pictures in turn. Fine texture that
    moves by its own size in a frame counts as flicker too, so compare with the dense or a real clip. NaN where
    nothing changes.
    """
    clips = check_clips(clips, frames=3)
    first = clips.diff(dim=1)
    ratio = first.diff(dim=1).square().flatten(1).mean(1) / first.square().flatten(1).mean(1)
    return torch.where(first.flatten(1).abs().amax(1) > 0, ratio, torch.full_like(ratio, math.nan))
