"""Muon (Jordan 2024), with the orthogonalisation in float32 and batched over matrices of one shape.

torch.optim.Muon does it in bfloat16, one matrix after the other, which on a CPU without bfloat16 units takes longer
than the forward and the backward of the tiny model together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration, Jordan 2024


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T of each matrix U S V^T of [n, rows, columns]."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; steps have the size of AdamW's, so both take one learning rate."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                by_shape[p.shape].append((p, p.grad.lerp(momentum, group["momentum"])))
            for (rows, columns), pairs in by_shape.items():
                update = orthogonalise(torch.stack([direction for _, direction in pairs]))
                size = group["lr"] * 0.2 * max(rows, columns) ** 0.5  # root mean square of AdamW's (Liu et al. 2025)
                for (p, _), new in zip(pairs, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(new, alpha=size)
