"""Cases of `block_mass` and `search_blocks`, shared by the CPU and Triton tests: queries, keys and an lse.

`interpret` computes a case with the Triton kernel, in a process that imported Triton with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 160
    kv_len: int = 320
    dim: int = 32
    block_q: int = 32
    block_kv: int = 32
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # "bshd": permuted from [B, S, H, D], lse as [B, S, H]
    mask: str = "none"  # "random": any key may be hidden; "padding": right padding; "all": one sample sees nothing
    scale: float | None = None
    spread: float = 1.0  # of q; the larger, the more peaked the scores
    lse: str = "own"  # "earlier": of other queries; "holes": some are -inf, +inf and NaN; "far": far from the scores

    def __str__(self) -> str:
        return self.name


HALF, BF16 = torch.float16, torch.bfloat16
CASES = [
    Case("even"),
    Case("ragged", q_len=141, kv_len=333),
    Case("one_block", q_len=7, kv_len=13),
    Case("blocks_differ", q_len=230, kv_len=250, block_q=64, block_kv=16),
    Case("block_of_48", q_len=150, kv_len=470, block_q=48, block_kv=48),
    Case("several_tiles", q_len=300, kv_len=600, block_q=256, block_kv=256, heads=1, kv_heads=1),
    Case("last_tile_is_empty", q_len=64, kv_len=256 + 64, block_kv=128, dim=64, dtype=HALF),
    Case("gqa", heads=4, kv_heads=2, batch=2, q_len=99, kv_len=333),
    Case("multi_query", heads=3, kv_heads=1, batch=2, q_len=99),
    Case("permuted", layout="bshd", batch=2, kv_len=333),
    Case("dim_24", dim=24, kv_len=333),
    Case("dim_1", dim=1, q_len=99),
    Case("dim_80", dim=80, heads=1, kv_heads=1, kv_len=999, block_kv=16),
    Case("dim_128", dim=128, heads=1, kv_heads=1),
    Case("dim_256", dim=256, heads=1, kv_heads=1, q_len=99, kv_len=99),
    Case("mask_random", mask="random", batch=2, kv_len=333),
    Case("mask_padding", mask="padding", batch=2, kv_len=333),
    Case("mask_all", mask="all", batch=2, kv_len=333),
    Case("peaked", spread=20.0, kv_len=601),
    Case("scale", scale=0.5, kv_len=333),
    Case("lse_of_an_earlier_step", lse="earlier", batch=2, q_len=141, kv_len=333),
    Case("holes", lse="holes", q_len=141, kv_len=333),
    Case("far", lse="far", q_len=141, kv_len=333),
    Case("fp16", dtype=HALF, kv_len=333, dim=24),
    Case("bf16", dtype=BF16, kv_len=333, mask="padding", batch=2),
    Case("bf16_permuted", dtype=BF16, layout="bshd", kv_len=300, dim=64, lse="earlier"),
]
ANY_BLOCK = Case("block_not_power_of_two", q_len=150, kv_len=470, block_q=31, block_kv=47, mask="random")
EACH_KEY = Case("each_key", q_len=141, kv_len=70, block_kv=1, mask="random")


def case_of(name: str) -> Case:
    """The case of that name."""
    return next(case for case in (*CASES, ANY_BLOCK, EACH_KEY) if case.name == name)


def build(case: Case) -> tuple[Any, ...]:
    """Arguments of `block_mass`."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def tensor(heads: int, length: int) -> torch.Tensor:
        x = torch.randn(case.batch, length, heads, case.dim, generator=generator).transpose(1, 2)
        return (x if case.layout == "bshd" else x.contiguous()).to(case.dtype)

    q, k = (tensor(case.heads, case.q_len) * case.spread).to(case.dtype), tensor(case.kv_heads, case.kv_len)
    mask = None
    if case.mask == "random":
        mask = torch.rand(case.batch, case.kv_len, generator=generator) < 0.4
    elif case.mask == "padding":
        mask = torch.arange(case.kv_len) < torch.randint(
            case.kv_len // 3, case.kv_len, (case.batch, 1), generator=generator
        )
    elif case.mask == "all":
        mask = torch.ones(case.batch, case.kv_len, dtype=torch.bool)
        mask[0] = False
    before = q + 0.3 * tensor(case.heads, case.q_len) if case.lse == "earlier" else q
    factor = case.dim**-0.5 if case.scale is None else case.scale
    scores = factor * before.double() @ k.double().repeat_interleave(case.heads // case.kv_heads, 1).mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    lse = scores.logsumexp(-1).float()
    if case.lse == "holes":
        lse[..., 1::7], lse[..., 2::7], lse[..., 3::7] = float("-inf"), float("inf"), float("nan")
    elif case.lse == "far":
        lse[..., 1::3] -= 130
        lse[..., 2::3] += 130
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2) if case.layout == "bshd" else lse
    return q, k, lse, case.scale, case.block_q, case.block_kv, mask


def check(mass: torch.Tensor, args: tuple[Any, ...]) -> None:
    """Compare with the fp64 reference."""
    from dynamicrad_compile.kernels.mass_arguments import BlockMass
    from dynamicrad_compile.kernels.mass_reference import block_mass_reference

    expected = block_mass_reference(*args)
    assert mass.dtype == torch.float32
    assert mass.is_contiguous()
    assert mass.shape == expected.shape
    expected = torch.where(expected > torch.finfo(torch.float32).max, float("inf"), expected)
    check_close(mass, expected, BlockMass(*args))


def tolerance(m: Any) -> float:
    """Relative error of a mass of these arguments, a BlockMass: 1e-5, more where scores are above 20."""
    return 1e-5 * max(1.0, float(m.factor * m.q.float().norm(dim=-1).amax() * m.k.float().norm(dim=-1).amax()) / 20)


def check_close(mass: torch.Tensor, expected: torch.Tensor, m: Any) -> None:
    """Compare with fp64 masses."""
    torch.testing.assert_close(mass.double(), expected, rtol=tolerance(m), atol=1e-30)


def interpret(name: str) -> tuple[torch.Tensor]:
    """The masses of a case."""
    from dynamicrad_compile.kernels._launch import INTERPRETED
    from dynamicrad_compile.kernels.mass_arguments import BlockMass
    from dynamicrad_compile.kernels.mass_triton import launch_mass

    assert INTERPRETED, "set TRITON_INTERPRET=1"
    return (launch_mass(BlockMass(*build(case_of(name)))),)
