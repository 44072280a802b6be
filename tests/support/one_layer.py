"""A checkpoint of the tiny video model with one layer, random weights in it."""

from __future__ import annotations

from pathlib import Path

import torch

from dynamicrad_compile.quality.tiny_video import data, model


def save_checkpoint(folder: Path) -> Path:
    """Write it; returns the folder."""
    config = {**model.TRANSFORMER, "num_layers": 1}
    torch.manual_seed(0)
    transformer, text = model.create(config)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    written = {"transformer": config, "vocabulary": data.vocabulary()}
    model.save(folder / "model.safetensors", model.state(transformer, text), written)
    return folder
