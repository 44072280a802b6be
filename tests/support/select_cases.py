"""Cases of `select_blocks` shared by the CPU and Triton tests: odd lengths, layouts, masks, shared and own plans.

`interpret` computes a case with the Triton kernels, in a process that imported Triton with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from dynamicrad_compile.kernels.blocks import cdiv
from dynamicrad_compile.kernels.select_arguments import Selection
from support.attention_cases import make_wrong

CRITERIA = ("threshold", "mass", "ratio")
RANKS = ("mass", "error")


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
    plan_batch: int = 1
    plan_heads: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # "bshd": permuted from [B, S, H, D]
    mask: str = "none"  # "random": any key may be hidden; "padding": right padding; "all": one sample sees nothing
    scale: float | None = None
    spread: float = 1.0  # of q; the larger, the more peaked the scores
    thresholds: tuple[tuple[float, float], ...] = ()  # one or one a sample; usual ones of the criterion if empty
    wrong: bool = False  # some counts and ids are out of range
    constant: bool = False  # the keys of every third block are equal
    offset: float = 0.0  # added to all keys, many times what they vary

    def __str__(self) -> str:
        return self.name


HALF, BF16 = torch.float16, torch.bfloat16
USUAL = {"threshold": (0.0, 0.3), "mass": (0.8, 0.55), "ratio": (0.7, 0.35)}
CASES = [
    Case("even"),
    Case("ragged", q_len=141, kv_len=333),
    Case("one_block", q_len=7, kv_len=13),
    Case("blocks_differ", q_len=230, kv_len=250, block_q=64, block_kv=16),
    Case("block_not_power_of_two", q_len=150, kv_len=470, block_q=48, block_kv=47),
    Case("gqa", heads=4, kv_heads=2, batch=2, q_len=99, kv_len=333),
    Case("gqa_per_head", heads=6, kv_heads=2, plan_heads=6, q_len=99, kv_len=333),
    Case("multi_query", heads=3, kv_heads=1, batch=2, q_len=99),
    Case("per_batch_and_head", batch=2, plan_batch=2, plan_heads=2, kv_len=601),
    Case("permuted", layout="bshd", batch=2, kv_len=333),
    Case("dim_24", dim=24, kv_len=333),
    Case("dim_1", dim=1, q_len=99),
    Case("dim_80", dim=80, heads=1, kv_heads=1, kv_len=999, block_kv=16),
    Case("dim_128", dim=128, heads=1, kv_heads=1),
    Case("wide", heads=1, kv_heads=1, q_len=96, kv_len=1400, block_kv=8),
    Case("mask_random", mask="random", batch=2, kv_len=333),
    Case("mask_padding", mask="padding", batch=2, kv_len=333),
    Case("mask_all", mask="all", batch=2, kv_len=333),
    Case("peaked", spread=200.0, kv_len=601),
    Case("overflowing", spread=1e30, scale=1e30, q_len=99, kv_len=601),
    Case("scale", scale=3.0, kv_len=333),
    Case("fp16", dtype=HALF, kv_len=333),
    Case("bf16", dtype=BF16, kv_len=333, mask="padding", batch=2),
    Case("thresholds_per_sample", batch=3, kv_len=601, thresholds=((0.2, 0.3), (0.5, 0.9), (1.0, 0.0))),
    Case("zeros", batch=2, thresholds=((0.0, 0.0), (-1.0, float("nan")))),
    Case("wrong", wrong=True, batch=2, plan_batch=2, q_len=200, kv_len=333),
    Case("one_key_last", heads=4, kv_heads=2, kv_len=321),
    Case("equal_keys", constant=True, batch=2, kv_len=601, mask="random", dim=24),
    Case("all_equal_keys", constant=True, kv_len=90, block_kv=1, q_len=99),
    Case("far_from_zero", offset=300.0, heads=1, kv_heads=1, kv_len=333, dim=80),
]
# Every case with one criterion, some with all: for the slow interpreter, and for ranks, which criteria do not know.
SHORT_LIST = [
    (case, criterion)
    for i, case in enumerate(CASES)
    for j, criterion in enumerate(CRITERIA)
    if i % 3 == j or case.name in ("per_batch_and_head", "thresholds_per_sample", "wrong")
]


def build_plan(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Counts, indices, forced, near: candidates in any order; an empty and a dense row where there is room."""
    m_q, m_k = cdiv(case.q_len, case.block_q), cdiv(case.kv_len, case.block_kv)
    width = max(1, m_k * 3 // 4)
    shape = (case.plan_batch, case.plan_heads, m_q)

    def random(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (low + torch.rand(shape, generator=generator) * (high - low + 1)).floor().minimum(high).int()

    indices = torch.rand(*shape, m_k, generator=generator).argsort(-1)[..., :width].int()
    counts = random(torch.ones(shape), torch.full(shape, float(min(width, m_k - 1) if m_k > 1 else 1)))
    forced = random(torch.zeros(shape), counts.clamp(max=2))
    near = random(forced, counts)
    if m_q > 3:
        counts[..., 0] = forced[..., 0] = near[..., 0] = 0
        counts[..., 1], indices[..., 1, :] = m_k, 1 << 30  # dense: indices are not read
        forced[..., 2] = 0
        forced[..., 3] = near[..., 3] = counts[..., 3]
    place = torch.arange(width)
    indices = torch.where((place < counts[..., None]) | (counts >= m_k)[..., None], indices, 1 << 30)
    if case.wrong:
        make_wrong(counts, indices, m_k)
        forced[..., 0], near[..., 2] = -2, 1 << 20
    return counts, indices, forced, near


def build(case: Case, criterion: str, rank: str = "mass") -> tuple[Any, ...]:
    """Positional arguments of the op, up to `rank`, which is left out where it is the default."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def tensor(heads: int, length: int, block: int) -> torch.Tensor:
        shape = (case.batch, length, heads, case.dim)
        means = torch.randn(case.batch, cdiv(length, block), heads, case.dim, generator=generator)
        x = means.repeat_interleave(block, 1)[:, :length] + torch.randn(shape, generator=generator)
        x = x.transpose(1, 2)
        return (x if case.layout == "bshd" else x.contiguous()).to(case.dtype)

    q, k = tensor(case.heads, case.q_len, case.block_q), tensor(case.kv_heads, case.kv_len, case.block_kv)
    if case.constant:
        fixed = torch.arange(case.kv_len) // case.block_kv % 3 == 0 if case.block_kv > 1 else torch.tensor(True)
        first = k[:, :, :: case.block_kv].repeat_interleave(case.block_kv, 2)[:, :, : case.kv_len]
        k = torch.where(fixed[..., None], first, k)
    k = (k.float() + case.offset).to(k.dtype) if case.offset else k
    plan = build_plan(case, generator)
    mask = None
    if case.mask == "random":
        mask = torch.rand(case.batch, case.kv_len, generator=generator) < 0.4
    elif case.mask == "padding":
        lengths = torch.randint(case.kv_len // 3, case.kv_len, (case.batch, 1), generator=generator)
        mask = torch.arange(case.kv_len) < lengths
    elif case.mask == "all":
        mask = torch.ones(case.batch, case.kv_len, dtype=torch.bool)
        mask[0] = False
    thresholds = torch.tensor(case.thresholds or [USUAL[criterion]])
    args = (q * case.spread, k, *plan, thresholds, case.scale, case.block_q, case.block_kv, criterion, mask)
    return args if rank == "mass" else (*args, rank)


def check(counts: torch.Tensor, indices: torch.Tensor, args: tuple[Any, ...]) -> float:
    """Compare with the fp64 reference; returns the share of rows that differ from it within rounding.

    Scores are sums of fp32 products of means that are rounded to the inputs' dtype, so a candidate whose score is
    that near the cut may fall on either side. Everything else must hold exactly.
    """
    from dynamicrad_compile.kernels.select_reference import NO_ERROR, candidate_rows, choose

    s = Selection(*args)
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.is_contiguous()
    assert indices.is_contiguous()
    assert counts.shape == (*s.q.shape[:2], s.kv_counts.shape[2])
    assert indices.shape == (*counts.shape, s.kv_indices.shape[3])
    eps = {torch.float32: 1e-4, HALF: 1e-2, BF16: 8e-2}[s.q.dtype]
    close, total = 0, 0
    for row in candidate_rows(s):
        count, got = int(counts[row.where]), indices[row.where].tolist()
        assert got[0 if row.dense else count :] == [0] * (len(got) - (0 if row.dense else count)), row.where
        if row.dense:
            assert count == cdiv(s.k.shape[2], s.block_kv)
            continue
        positions = [row.ids.index(j) for j in got[:count]]
        assert positions == sorted(set(positions)), f"the order of candidates is lost in {row.where}"
        assert count >= min(1, len(row.ids))
        pair = s.thresholds[row.where[0] % len(s.thresholds)].tolist()
        total += 1
        if positions != (expected := choose(row, tuple(pair), s.criterion)):
            close += 1
            tolerance = eps * max(1.0, max((abs(s) for s in row.scores if s > NO_ERROR), default=0.0) / 10)
            assert _near_the_cut(row, set(positions), pair, s.criterion, tolerance), (row.where, positions, expected)
    return close / max(1, total)


def _near_the_cut(row: Any, got: set[int], pair: list[float], criterion: str, eps: float) -> bool:
    """Whether a choice that differs from the reference's is one that rounding of scores by eps explains."""
    from dynamicrad_compile.kernels.select_reference import choose, log_or_hidden

    assert set(range(row.forced)) <= got
    for group, threshold in zip(row.groups, pair, strict=True):
        kept, dropped = got & set(group), set(group) - got
        if criterion == "threshold":
            logs = {j: log_or_hidden(len(row.ids) * share) for j, share in row.shares(range(len(row.ids))).items()}
            fine = all(logs[j] >= threshold - eps for j in kept) and all(logs[j] < threshold + eps for j in dropped)
            single = len(got) == 1 and all(row.scores[j] <= row.scores[next(iter(got))] + eps for j in group)
            if not fine and not single:
                return False
            continue
        low = min((row.scores[j] for j in kept), default=math.inf)
        if low < max((row.scores[j] for j in dropped), default=-math.inf) - eps:
            return False
        shares = row.shares(group)
        if criterion == "ratio" or not kept:
            continue
        held, last = sum(shares[j] for j in kept), min(shares[j] for j in kept)
        if held < threshold - eps or held - last > threshold + eps:
            return len(got) == 1
    return criterion != "ratio" or len(got) == len(choose(row, (pair[0], pair[1]), "ratio"))


def interpret(name: str, criterion: str, rank: str) -> tuple[torch.Tensor, ...]:
    """Counts and indices of a case."""
    from dynamicrad_compile.kernels._launch import INTERPRETED
    from dynamicrad_compile.kernels.blocks import valid_counts
    from dynamicrad_compile.kernels.pool_triton import launch_moments
    from dynamicrad_compile.kernels.select_triton import launch_select

    assert INTERPRETED, "set TRITON_INTERPRET=1"
    case = next(case for case in CASES if case.name == name)
    s = Selection(*build(case, criterion, rank))
    n_q = valid_counts(case.q_len, case.block_q, None, s.q.device)
    n_k = valid_counts(case.kv_len, case.block_kv, s.kv_mask, s.q.device)
    moments = ("square", "variance") if rank == "error" else ("", "")
    q_mean, square = launch_moments(s.q, n_q, case.block_q, None, None, moments[0])
    k_mean, variance = launch_moments(s.k, n_k, case.block_kv, s.kv_mask, None, moments[1])
    seconds = (square, variance) if rank == "error" else None
    shape = (*s.q.shape[:2], *s.kv_indices.shape[2:])
    out = torch.full(shape[:3], 77, dtype=torch.int32), torch.full(shape, 77, dtype=torch.int32)
    arguments = (s, q_mean, k_mean, n_k, *out)
    launch_select(*arguments, torch.tensor([False]), seconds)
    assert all(bool((x == 77).all()) for x in out), "written although refresh is False"
    launch_select(*arguments, None, seconds)
    return out
