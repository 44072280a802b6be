"""The regimes that the prompts of a generation were given, kept on the device.

A new prompt compiles nothing and waits for nothing, as a new step does (see `clock`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from .clock import FRESH, STEP, may_be_mixed
from .router import SAFE_REGIME

MAX_BATCH = 64
"""Rows of a batch whose regimes can be remembered."""


def new_regimes(device: torch.device | str = "cpu") -> Tensor:
    """Buffer of the latched regimes, int64 [MAX_BATCH]."""
    return torch.full((MAX_BATCH,), SAFE_REGIME, dtype=torch.int64, device=device)


@has_side_effect
def latch(routed: Tensor, clock: Tensor, latched: Tensor) -> Tensor:
    """The regimes of this call, int64 [B]: those routed at the first call of the generation, which are remembered.

    So the negative prompt of classifier-free guidance, which comes second, is given the regime of the prompt. Where
    calls of several requests may be mixed, no row gets a regime of less motion than its own prompt's.
    """
    begins = (clock[STEP] == 0) & (clock[FRESH] > 0)
    kept = latched[: routed.shape[0]]
    regimes = torch.where(begins, routed, torch.where(may_be_mixed(clock), torch.maximum(routed, kept), kept))
    kept.copy_(regimes)
    return regimes
