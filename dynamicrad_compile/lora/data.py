"""Clips to train on: what a data set must give, a folder of files, and the order in which clips come.

A data set is anything with `len(data)` and `data[i] -> Clip`. The order is a function of seed and step alone, so a
resumed training sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import LoraError
from ..profiles import REGIMES

LATENTS, REGIME = "latents", "regime"


@dataclass(frozen=True)
class Clip:
    """One clip.

    latents     [C, F, H, W], as the model takes them: scaled, not patchified
    conditions  what else the model's forward is given by name, without the batch dimension; for most models
                encoder_hidden_states [L, D]
    regime      0, 1, 2 for low, mid and high motion; None: not known
    """

    latents: Tensor
    conditions: dict[str, Tensor]
    regime: int | None = None


@dataclass(frozen=True)
class Batch:
    """Clips stacked: latents [B, C, F, H, W], conditions [B, ...], regime int64 [B] or None."""

    latents: Tensor
    conditions: dict[str, Tensor]
    regime: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The same on a device; floating point tensors in `dtype`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype) if x.is_floating_point() else x.to(device)

        conditions = {name: move(x) for name, x in self.conditions.items()}
        return Batch(move(self.latents), conditions, None if self.regime is None else self.regime.to(device))


class Clips(Protocol):
    """A data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Clip: ...


class ClipFolder:
    """Clips of a folder, one .safetensors file each, in the order of their names.

    A file holds `latents` [C, F, H, W], optionally `regime` (an integer tensor of one element), and the conditions
    under the names of the model's arguments, without the batch dimension. All files must have the same shapes.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise LoraError(f"there is no .safetensors file in {folder}; one a clip is expected.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Clip:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.files[index]
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise LoraError(f"{file} is not a safetensors file: {error}.") from None
        latents, regime = tensors.pop(LATENTS, None), tensors.pop(REGIME, None)
        if latents is None or latents.dim() != 4:
            found = "none" if latents is None else list(latents.shape)
            raise LoraError(f"{file} must hold `{LATENTS}` [channels, frames, height, width], found {found}.")
        if regime is not None and (regime.numel() != 1 or int(regime) not in range(len(REGIMES))):
            raise LoraError(f"{file}: `{REGIME}` must be 0, 1 or 2 (low, mid, high motion), found {regime.tolist()}.")
        return Clip(latents, tensors, None if regime is None else int(regime))


def collate(clips: Sequence[Clip]) -> Batch:
    """Stack clips. Raises LoraError where their shapes or conditions differ."""
    first = clips[0]
    for clip in clips[1:]:
        shapes = [{"latents": c.latents.shape, **{k: v.shape for k, v in c.conditions.items()}} for c in (first, clip)]
        if shapes[0] != shapes[1]:
            told = " and ".join(str({k: list(v) for k, v in s.items()}) for s in shapes)
            raise LoraError(f"clips of one batch must have the same shapes, found {told}. Use batch_size = 1.")
    labels = [clip.regime for clip in clips]
    return Batch(
        torch.stack([clip.latents for clip in clips]),
        {name: torch.stack([clip.conditions[name] for clip in clips]) for name in first.conditions},
        None if None in labels else torch.tensor(labels, dtype=torch.int64, device="cpu"),
    )


def order(length: int, seed: int, first: int, stop: int) -> Iterator[int]:
    """Numbers of the clips at places first .. stop of an endless sequence: one permutation after the other."""
    epoch, permutation = -1, []
    for place in range(first, stop):
        if place // length != epoch:
            epoch = place // length
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutation = torch.randperm(length, generator=generator, device="cpu").tolist()
        yield permutation[place % length]


def batches(
    data: Clips, size: int, first: int, stop: int, share: tuple[int, int], seed: int, workers: int = 0
) -> DataLoader[Batch]:
    """The batches of calls first .. stop for one process; share = (its number, number of processes)."""
    rank, world = share
    chosen = [
        list(order(len(data), seed, (call * world + rank) * size, (call * world + rank + 1) * size))
        for call in range(first, stop)
    ]
    return DataLoader(data, batch_sampler=chosen, collate_fn=collate, num_workers=workers)
