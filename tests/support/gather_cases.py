"""Cases of attention that reads rows through a token order: those of `attention_cases`, and their results.

`interpret` computes a case with the Triton kernel, in a process that imported Triton with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dynamicrad_compile.kernels.attention_arguments import Attention, Means
from dynamicrad_compile.plans.order import inverse, reordered
from support.attention_cases import build, case_of

# Each has an empty row, those of more than three rows a dense one with wrong ids; as many keys as queries.
_NAMES = """
    even gqa_per_head per_batch_and_head permuted sliced dim_24 mask_random mask_all fp16 bf16
    mean_gqa mean_per_sample mean_permuted mean_bf16
"""
# How the kernel may be launched, and the cases that are run so.
VARIANTS = {
    "": _NAMES.split(),
    "splits": ["gqa_per_head", "mean_gqa"],
    "int8": ["gqa_per_head", "mean_bf16"],
    "tma": ["fp16"],
}


def scattered(a: Attention, seed: int) -> tuple[Attention, torch.Tensor]:
    """Arguments whose tokens are shuffled, by hand, and the row of each place, int32 [S]."""
    order = torch.randperm(a.q.shape[2], generator=torch.Generator().manual_seed(seed)).unsqueeze(0)
    back = inverse(order)

    def shuffled(x: torch.Tensor) -> torch.Tensor:
        # In the layout of x, whose strides the kernel is passed.
        rows = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        return rows.copy_(reordered(x.cpu(), back)).to(x.device)

    mask = None if a.kv_mask is None else a.kv_mask[:, back[0].to(a.kv_mask.device)]
    rows = a._replace(q=shuffled(a.q), k=shuffled(a.k), v=shuffled(a.v), kv_mask=mask)
    return rows, order[0].to(a.q.device, torch.int32)


def run(a: Attention, means: Means | None, variant: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in the order of the plan; `variant` is one of VARIANTS."""
    from dynamicrad_compile.kernels._launch import chip
    from dynamicrad_compile.kernels.attention_triton import launch_forward
    from dynamicrad_compile.kernels.tiles import choose_tile

    rows, places = scattered(a, seed=a.q.shape[2] + a.q.shape[3])
    device, half = chip(a.q.device), a.q.dtype != torch.float32
    tile = choose_tile(device, half, a.q.shape[3], a.block_q, a.block_kv)
    tile = replace(tile, block_n=16, kernel="tma" if variant == "tma" else "triton")
    out, lse = launch_forward(
        rows._replace(qk_int8=variant == "int8"), means, tile, splits=3 if variant == "splits" else 1, places=places
    )
    assert out.is_contiguous()
    return out[:, :, places.long()], lse[:, :, places.long()]


def interpret(name: str, variant: str) -> tuple[torch.Tensor, ...]:
    """out, in fp32, and lse of a case."""
    from dynamicrad_compile.kernels._launch import INTERPRETED
    from dynamicrad_compile.kernels.means import means_of

    assert INTERPRETED, "set TRITON_INTERPRET=1"
    a = Attention(*build(case_of(name)))
    out, lse = run(a, None if a.compensate is None else means_of(a), variant)
    return out.float(), lse
