"""Which chip a GPU is, as the table of tiles calls it."""

from __future__ import annotations

from typing import TypeAlias

import torch

Chip: TypeAlias = tuple[int, int] | str
"""Compute capability of an NVIDIA GPU, or the architecture of an AMD GPU ("gfx942")."""


def chip_of(device: torch.device | int) -> Chip:
    """The chip of a device that PyTorch calls cuda. ROCm's number in the place of a compute capability is none."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return torch.cuda.get_device_capability(device)


def name_of(chip: Chip) -> str:
    """sm_NN, or AMD's name."""
    return chip if isinstance(chip, str) else f"sm_{chip[0]}{chip[1]}"
