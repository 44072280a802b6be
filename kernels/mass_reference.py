"""Slow fp64 reference of `block_mass`: one pair of blocks at a time. For tests and for reading."""

from __future__ import annotations

from typing import Any

import torch

from .mass_arguments import BlockMass


def block_mass_reference(*args: Any, **kwargs: Any) -> torch.Tensor:
    """fp64 [B, H, Mq, Mk] of the op's arguments."""
    m = BlockMass(*args, **kwargs)
    batch, heads, n_q, n_kv = m.shape
    mass = torch.zeros(batch, heads, n_q, n_kv, dtype=torch.float64, device="cpu")
    for b in range(batch):
        valid = torch.ones(m.k.shape[2], dtype=torch.bool, device="cpu")
        valid = valid if m.kv_mask is None else m.kv_mask[b % m.kv_mask.shape[0]]
        for h in range(heads):
            keys = m.k[b, h // (heads // m.k.shape[1])].double()
            for i in range(n_q):
                rows = slice(i * m.block_q, (i + 1) * m.block_q)
                lse = m.lse[b, h, rows].double()
                counts = lse.isfinite()
                for j in range(n_kv):
                    columns = slice(j * m.block_kv, (j + 1) * m.block_kv)
                    scores = m.factor * m.q[b, h, rows].double() @ keys[columns][valid[columns]].T
                    mass[b, h, i, j] = (scores[counts] - lse[counts, None]).exp().sum()
    return mass.nan_to_num(nan=0.0, posinf=float("inf"))
