"""RIFLEx: one frequency of a model's RoPE over time lowered, for clips longer than those it was trained on.

    with riflex(pipe.transformer, frames=42, trained=21):
        video = pipe(prompt, num_frames=165).frames

Source: Zhao et al., "RIFLEx" (2025). Component k of a RoPE turns by freq[k] a frame and comes back after the period
2 pi / freq[k]. A clip longer than that may repeat itself. With L trained frames, s times as many wanted,

    freq[k] = 2 pi share / (L s)

for one k, the intrinsic one; all others stay. Here k is the first whose period is at least L: the fastest that never
came back in training. On the models of the paper's code that is its own choice (HunyuanVideo: the fourth; CogVideoX:
the second); give another one as `component`. Its code has share = 0.9, so that the clip ends before the period does.

Nothing else of the model changes, and attention neither: masks, grids and compiled graphs are what they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import DynamicRadError

NAMES = "freqs_cos", "freqs_sin"
"""Buffers of a table, [positions, columns], the columns of time first, each component in two columns side by side."""


def lowered(freqs: Tensor, frames: int, trained: int, component: int | None = None, share: float = 0.9) -> Tensor:
    """Frequencies [K], radians a frame, of which one is lowered; as they are where frames <= trained.

    freqs      in falling order, as RoPE has them
    frames     latent frames that are wanted; trained: those of the training
    component  which one, from 0; None: the first whose period is at least `trained` frames
    share      of the period that the clip covers, above 0 and at most 1

    A component that is slower already stays. Raises DynamicRadError for numbers out of range, or if no component has
    such a period.
    """
    if frames < 1 or trained < 1:
        raise DynamicRadError(f"frames and trained must be at least 1, got {frames} and {trained}.")
    if not 0 < share <= 1:
        raise DynamicRadError(f"share must be above 0 and at most 1, got {share}.")
    if component is None:
        slow = (2 * math.pi / freqs.double() >= trained).nonzero()
        if not len(slow):
            raise DynamicRadError(f"no component has a period of {trained} frames or more: nothing to lower.")
        component = int(slow[0])
    if not 0 <= component < len(freqs):
        raise DynamicRadError(f"component must be one of 0 to {len(freqs) - 1}, got {component}.")
    found = freqs.clone()
    if frames > trained:
        found[component] = min(float(freqs[component]), 2 * math.pi * share / frames)
    return found


@contextmanager
def riflex(
    model: nn.Module, frames: int, trained: int, component: int | None = None, share: float = 0.9
) -> Iterator[None]:
    """The model with its RoPE table changed as `lowered` says, as long as this is open.

    The table is that of diffusers' Wan (`model.rope`) and of models built like it: buffers freqs_cos and freqs_sin of
    a module with the number of time's columns, t_dim. It is changed in place, so a model compiled before or
    afterwards has it. Raises DynamicRadError if there is none; models that compute their angles at each call need
    `lowered` where they have their frequencies.
    """
    tables = [m for m in model.modules() if isinstance(getattr(m, "t_dim", None), int) and _has_tables(m)]
    if not tables:
        raise DynamicRadError(
            f"{type(model).__name__} has no RoPE table with buffers freqs_cos and freqs_sin and the number of time's "
            "columns, t_dim. Lower a frequency where it computes them: models.riflex.lowered(freqs, frames, trained)."
        )
    kept = []
    try:
        for module in tables:
            cos, sin = (getattr(module, name) for name in NAMES)
            if frames > len(cos):
                raise DynamicRadError(f"the RoPE table has {len(cos)} positions, fewer than the {frames} frames.")
            time = slice(0, module.t_dim)
            before = torch.atan2(sin[1, time].double(), cos[1, time].double())[::2]
            after = lowered(before, frames, trained, component, share)
            k = (after != before).nonzero().flatten()
            columns = torch.stack([2 * k, 2 * k + 1], dim=1).flatten()
            positions = torch.arange(len(cos), dtype=torch.float64, device=cos.device)
            angles = torch.outer(positions, after[k]).repeat_interleave(2, dim=1)
            for table, values in ((cos, angles.cos()), (sin, angles.sin())):
                kept.append((table, columns, table[:, columns].clone()))
                with torch.no_grad():
                    table[:, columns] = values.to(table.dtype)
        yield
    finally:
        for table, columns, values in kept:
            with torch.no_grad():
                table[:, columns] = values


def _has_tables(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), Tensor) for name in NAMES)
