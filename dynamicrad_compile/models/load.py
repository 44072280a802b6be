"""Transformers of diffusers with weights, for `dynamicrad export`: those of a local folder, or random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..beforehand import usable_device
from ..errors import ExportError, nearest
from .fake import specify
from .presets import Inputs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    name: str,
    *,
    frames: int = 81,
    height: int = 480,
    width: int = 832,
    layers: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[torch.nn.Module, Inputs, bool]:
    """(transformer, keyword arguments for its forward, whether its weights are random).

    name                   a preset or a class of diffusers (random weights), or a folder of a pipeline or transformer
    frames, height, width  of the video, in frames and pixels
    layers                 keep only so many layers of each kind, with random weights; 0 keeps all
    Raises ExportError or DynamicRadError if a name, a size or a dtype does not fit or a file is missing.
    """
    if dtype not in DTYPES:
        raise ExportError(f"unknown dtype {dtype!r}.{nearest(dtype, DTYPES)} Known: {', '.join(DTYPES)}.")
    usable_device(device, ExportError)
    cls, config, inputs = specify(name, frames=frames, height=height, width=width, layers=layers)
    folder = _weights_folder(Path(name)) if Path(name).exists() and not layers else None
    torch.manual_seed(0)
    if folder is not None:
        try:
            model = cls.from_pretrained(folder, torch_dtype=DTYPES[dtype], use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ExportError(f"the transformer in {folder} can't be loaded: {error}") from None
    else:
        model = cls.from_config(config).to(DTYPES[dtype])
    call = {key: _filled(key, value, DTYPES[dtype], device) for key, value in inputs().items()}
    return model.eval().to(device), call, folder is None


def _weights_folder(path: Path) -> Path:
    """The folder with config.json and weights. Raises ExportError if there are none."""
    root = path.parent if path.is_file() else path
    for folder in (root / "transformer", root):
        if (folder / "config.json").is_file():
            if any(folder.glob("*.safetensors")):
                return folder
            raise ExportError(
                f"{folder} has no *.safetensors. Put the weights there, or give a preset by name for random ones."
            )
    raise ExportError(f"{path} has neither transformer/config.json nor config.json.")


def _filled(name: str, value: Any, dtype: torch.dtype, device: str) -> Any:
    """An input with random content in the model's dtype; timesteps and position tables stay float32."""
    if isinstance(value, (list, tuple)):
        return type(value)(_filled("", item, torch.float32, device) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        keep = name in ("", "timestep")
        value = (
            torch.full_like(value, 500.0)
            if name == "timestep"
            else torch.randn(value.shape, dtype=torch.float32, device="cpu")
        )
        value = value.to(torch.float32 if keep else dtype)
    return value.to(device)
