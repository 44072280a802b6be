"""Cases of the second moments of blocks, shared by the CPU and Triton tests; slow fp64 formulas beside them.

`interpret` computes a case with the Triton kernel, in a process that imported Triton with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch

MOMENTS = ("square", "variance")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LENGTH = 101
CASES = [  # dtype, block, mask, mean
    ("fp32", 32, "none", 0.0),
    ("fp32", 1, "none", 3.0),
    ("fp32", 101, "mask", 0.0),
    ("fp32", 200, "shared_mask", 100.0),
    ("fp32", 48, "mask", 1e4),
    ("fp32", 16, "none", 1e4),
    ("fp16", 48, "shared_mask", 200.0),
    ("bf16", 32, "mask", 10.0),
]


def build(dtype: str, masks: str, offset: float, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [2, 3, LENGTH, dim], permuted from [B, S, H, D], one token of which is far from all others, and the mask."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, LENGTH, 3, dim, generator=generator) + offset
    x[:, 32] += 30.0  # the first of a block of 16 or 32
    x = x.to(DTYPES[dtype]).transpose(1, 2)
    if masks == "none":
        return x, None
    mask = torch.rand(2 if masks == "mask" else 1, LENGTH, generator=generator) < 0.5
    mask[0, 48:96] = False  # whole blocks are hidden
    return x, mask


def reference(x: torch.Tensor, block: int, mask: torch.Tensor | None, moment: str) -> torch.Tensor:
    """fp64 [B, H, M, D], one block at a time."""
    valid = torch.ones(1, x.shape[2], dtype=torch.bool) if mask is None else mask
    out = torch.zeros(*x.shape[:2], -(-x.shape[2] // block), x.shape[3], dtype=torch.float64)
    for b, h, j in torch.cartesian_prod(*(torch.arange(n) for n in out.shape[:3])).tolist():
        inside = slice(j * block, (j + 1) * block)
        tokens = x[b, h, inside].double()[valid[b % len(valid), inside]]
        if len(tokens):
            out[b, h, j] = (tokens - tokens.mean(0) * (moment == "variance")).square().mean(0)
    return out


def close(found: torch.Tensor, x: torch.Tensor, block: int, mask: torch.Tensor | None, moment: str) -> None:
    """Compare with the reference. What x's dtype has rounded away is gone in both, so the bound is fp32's.

    A block of 32 that begins with the far token loses a factor of 31 (`kernels.pool_cpu`) of some roundings of 6e-8.
    """
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    expected = reference(x, block, mask, moment)
    torch.testing.assert_close(found.double(), expected, rtol=5e-5, atol=1e-12)
    assert not found[expected == 0].any(), "equal tokens do not vary"


def interpret(dtype: str, block: int, masks: str, offset: float, moment: str) -> tuple[torch.Tensor, ...]:
    """Means, in fp32, and moments of a case."""
    from dynamicrad_compile.kernels._launch import INTERPRETED
    from dynamicrad_compile.kernels.blocks import valid_counts
    from dynamicrad_compile.kernels.pool_triton import launch_moments

    assert INTERPRETED, "set TRITON_INTERPRET=1"
    x, mask = build(dtype, masks, offset)
    count = valid_counts(LENGTH, block, mask, x.device)
    mean, second = launch_moments(x, count, block, mask, torch.tensor([True]), moment)
    return mean.float(), second
