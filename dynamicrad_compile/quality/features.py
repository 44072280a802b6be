"""Features of clips without a pretrained network: a small 3-D convolutional network with fixed random weights.

No package on the index carries the weights of a perceptual backbone (lpips has its linear heads only and loads AlexNet
or VGG from elsewhere), so this network is *not* trained: three layers of random, orthogonal filters that see edges,
textures and their motion. Distances on it rank noise, blur, colour and motion errors; they know nothing of meaning, and
their numbers are not comparable with LPIPS, FID or FVD.

    feature distance   as LPIPS: activations scaled to unit length over channels, squared difference, mean over places
                       and layers (Zhang et al. 2018, without learnt weights)
    Frechet distance   |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the features of WINDOW frames each, in
                       DIMENSIONS random directions. Few clips bias it upwards: compare equal numbers of clips, and with
                       the distance of two sets of real ones
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DynamicRadError
from .metrics import check_clips

SEED = 20261124
CHANNELS = (24, 48, 96)
DIMENSIONS = 24
WINDOW = 4


@functools.lru_cache(maxsize=4)
def _network(channels: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Filters [out, in, 3, 3, 3] of the layers, and the directions [sum of 2 x channels, DIMENSIONS] of clip vectors.

    Drawn by numpy, whose generator is the same everywhere.
    """
    generator = np.random.Generator(np.random.PCG64(SEED))
    filters = []
    for out in CHANNELS:
        drawn = generator.standard_normal((channels * 27, out))
        q, r = np.linalg.qr(drawn)
        q = q * np.sign(np.diagonal(r))  # so that it does not depend on the LAPACK at hand
        filters.append(torch.from_numpy(q.T.reshape(out, channels, 3, 3, 3) * 2.0**0.5).float())
        channels = out
    wide = 2 * sum(CHANNELS)
    q, r = np.linalg.qr(generator.standard_normal((wide, DIMENSIONS)))
    return tuple(filters), torch.from_numpy(q * np.sign(np.diagonal(r))).double()


def feature_maps(clips: Tensor) -> list[Tensor]:
    """Activations fp32 [N, channels, F, H', W'] of each layer for clips float [N, F, C, H, W] in 0..1."""
    clips = check_clips(clips)
    if min(clips.shape[-2:]) < 8:
        raise DynamicRadError(f"features need frames of at least 8x8 pixels, got {list(clips.shape[-2:])}.")
    filters, _ = _network(clips.shape[2])
    x = ((clips - 0.5) / 0.25).float().transpose(1, 2)
    maps = []
    for weight in filters:
        x = F.conv3d(F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate"), weight, stride=(1, 2, 2))
        x = F.leaky_relu(x, 0.2)
        maps.append(x)
    return maps


def feature_distance(clips: Tensor, reference: Tensor) -> Tensor:
    """fp64 [N]: distance of each clip to its reference, 0 for equal ones, at most 4; symmetric."""
    if clips.shape != reference.shape:
        raise DynamicRadError(f"clips and reference must agree, got {list(clips.shape)} and {list(reference.shape)}.")
    total = torch.zeros(len(clips), dtype=torch.float64, device="cpu")
    for a, b in zip(feature_maps(clips), feature_maps(reference), strict=True):
        difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
        total += difference.square().sum(1).flatten(1).mean(1).double()
    return total / len(CHANNELS)


def clip_vectors(clips: Tensor) -> Tensor:
    """fp64 [N * floor(F / WINDOW), DIMENSIONS]: mean and spread of every channel over WINDOW frames, projected."""
    windows = clips.shape[1] // WINDOW
    if windows < 1:
        raise DynamicRadError(f"a clip must have at least {WINDOW} frames, got {clips.shape[1]}.")
    parts = []
    for x in feature_maps(clips):
        x = x[:, :, : windows * WINDOW].double()
        x = x.unflatten(2, (windows, WINDOW)).transpose(1, 2).flatten(0, 1).flatten(2)
        parts += [x.mean(2), x.std(2)]
    return torch.cat(parts, dim=1) @ _network(clips.shape[2])[1]


def frechet_distance(clips: Tensor, reference: Tensor) -> float:
    """Frechet distance of two sets of clips, of any number each; 0 for equal sets. Needs two windows a set at least."""
    first, second = clip_vectors(clips), clip_vectors(reference)
    if min(len(first), len(second)) < 2:
        raise DynamicRadError("the Frechet distance needs at least two windows of frames in each set.")
    difference = first.mean(0) - second.mean(0)
    a, b = first.T.cov(), second.T.cov()
    root = _root(a)
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0.0).sqrt().sum()
    return max(0.0, float(difference.square().sum() + a.trace() + b.trace() - 2.0 * cross))


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
