"""What frames look like, as unit vectors: what scores of loops and of consistency compare frames by.

Features are a function: clips float [N, F, C, H, W] in 0..1 -> unit vectors [N, F, D]. Two are here:

    coarse_features  the pixels themselves, averaged down to at most 16 x 16, less the frame's mean colour: needs no
                     model. A constant of 0.01 stands beside them, so that two frames without any contrast are alike
    clip_features    the image embeddings of a CLIP model in a local folder, as VQeval and VBench take them
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DynamicRadError
from ..optional import optional
from .metrics import check_clips

FrameFeatures = Callable[[Tensor], Tensor]

GRID = 16
CONSTANT = 0.01  # 2.5 of 255
BATCH = 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on; a folder may have its own."""


def coarse(clips: Tensor) -> Tensor:
    """fp64 [N, F, C, h, w]: frames averaged down to at most GRID x GRID."""
    clips = check_clips(clips)
    size = tuple(min(GRID, extent) for extent in clips.shape[-2:])
    return F.adaptive_avg_pool2d(clips.flatten(0, 1), size).unflatten(0, clips.shape[:2])


def coarse_features(clips: Tensor) -> Tensor:
    """fp64 [N, F, D]: unit vectors of coarse pixels, less the mean of each channel of the frame."""
    small = coarse(clips)
    pixels = (small - small.mean((-2, -1), keepdim=True)).flatten(2)
    constant = torch.full_like(pixels[..., :1], CONSTANT * pixels.shape[-1] ** 0.5)
    return F.normalize(torch.cat([pixels, constant], dim=-1), dim=-1)


def clip_features(folder: str | Path) -> FrameFeatures:
    """Image embeddings by the CLIP model of a local folder, as transformers saves one; nothing is downloaded.

    Frames are resized to the model's square, bilinear, whatever their shape. Only weights in safetensors are read.
    Raises DynamicRadError where the folder holds no such model, or transformers is missing.
    """
    folder = Path(folder)
    config = _json(folder / "config.json") if folder.is_dir() else None
    if config is None:
        raise DynamicRadError(
            f"--features expects the folder of a CLIP model (config.json and model.safetensors), got {str(folder)!r}."
        )
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise DynamicRadError(f"{folder} holds a model of type {config.get('model_type')!r}; expected 'clip'.")
    if not list(folder.glob("*.safetensors")):
        raise DynamicRadError(f"{folder} has no weights in safetensors: save the model with save_pretrained.")
    transformers = optional("transformers", "CLIP features need", "diffusers")
    broken = optional("safetensors", "CLIP features need", "eval").SafetensorError
    try:
        model, loading = transformers.CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except broken as error:
        raise DynamicRadError(f"{folder} has weights that can't be read: {error}. Copy or save them again.") from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise DynamicRadError(f"{folder} lacks {len(missing)} weights of a CLIP vision model, such as {missing[0]}.")
    model.eval().requires_grad_(False)
    said = _json(folder / "preprocessor_config.json") or {}
    mean, std = (
        torch.tensor(said.get(name, known), dtype=torch.float32, device="cpu")
        for name, known in (("image_mean", MEAN), ("image_std", STD))
    )
    size = model.config.image_size

    def features(clips: Tensor) -> Tensor:
        frames = check_clips(clips).float()
        if frames.shape[2] not in (1, 3):
            raise DynamicRadError(f"CLIP features need clips of 1 or 3 channels, got {frames.shape[2]}.")
        flat = frames.flatten(0, 1).expand(-1, 3, -1, -1)
        found = []
        for part in flat.split(BATCH):
            square = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)
            pixels = (square - mean[:, None, None]) / std[:, None, None]
            with torch.no_grad():
                found.append(model(pixel_values=pixels).image_embeds)
        return F.normalize(torch.cat(found).double(), dim=-1).unflatten(0, frames.shape[:2])

    return features


def _json(file: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None if it is no such file, or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def checked_features(features: FrameFeatures, clips: Tensor) -> Tensor:
    """fp64 [N, F, D], unit vectors of the clips. Raises DynamicRadError if the function gives anything else."""
    found = features(clips)
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != clips.shape[:2]:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DynamicRadError(f"features must be [{clips.shape[0]}, {clips.shape[1]}, D] for these clips, got {got}.")
    return F.normalize(found.detach().cpu().double(), dim=-1)


def consistency(clips: Tensor, features: FrameFeatures = coarse_features) -> Tensor:
    """fp64 [N]: how alike frames are, by the formula of VBench's subject and background consistency.

        mean over t >= 2 of (cos(frame 1, frame t) + cos(frame t - 1, frame t)) / 2

    1 is a frozen clip: it rewards what does not move.
    """
    found = checked_features(features, check_clips(clips, frames=2))
    to_first = (found[:, 1:] * found[:, :1]).sum(-1)
    to_last = (found[:, 1:] * found[:, :-1]).sum(-1)
    return (0.5 * (to_first + to_last)).mean(1)
