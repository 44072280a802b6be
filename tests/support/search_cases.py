"""Cases of `search_blocks`, shared by the CPU and Triton tests: those of `block_mass` with blocks that are always kept.

`interpret` computes a case with the Triton kernels, in a process that imported Triton with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import mass_cases

RANKS = ("mass", "error")


@dataclass(frozen=True)
class Case:
    name: str
    of: str = "even"  # case of `block_mass`
    sparsity: float = 0.7
    recall_threshold: float = 0.4
    plan: str = "shared"  # "own": of each sample and head; "dense": some rows; "wrong": out of range; "none"; "much"
    equal: bool = False  # all keys are 0

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("even"),
    Case("ragged", "ragged", plan="own"),
    Case("gqa", "gqa", plan="dense"),
    Case("multi_query", "multi_query", 0.8, plan="own"),
    Case("permuted", "permuted", plan="wrong"),
    Case("mask_random", "mask_random", plan="dense"),
    Case("mask_all", "mask_all"),
    Case("one_block", "one_block"),
    Case("one_head", "dim_128", 0.5, 0.0, plan="own"),
    Case("dim_24", "dim_24", 0.2, 0.0),
    Case("blocks_differ", "blocks_differ", 0.9),
    Case("peaked", "peaked", 0.6, 0.9, plan="none"),
    Case("lse_of_an_earlier_step", "lse_of_an_earlier_step", plan="own"),
    Case("holes", "holes"),
    Case("far", "far"),
    Case("bf16", "bf16", 0.5, plan="dense"),
    Case("heads_alike", "gqa", 1.0),
    Case("nothing_is_dropped", "gqa", 0.0, plan="none"),
    Case("more_than_the_budget", "gqa", 0.9, 0.0, plan="much"),
    Case("equal_scores", "gqa", 0.75, 0.0, equal=True),
    Case("equal_scores_one_head", "dim_256", 0.5, 1.0, equal=True),
]
SHORT_LIST = [case for case in CASES if case.name not in ("even", "one_block", "blocks_differ", "far", "heads_alike")]


def case_of(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


def build(case: Case, rank: str) -> tuple[Any, ...]:
    """Arguments of `search_blocks`."""
    q, k, lse, scale, block_q, block_kv, mask = mass_cases.build(mass_cases.case_of(case.of))
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    if case.equal:
        k, lse = torch.zeros_like(k), torch.full_like(lse, 5.0)
    n_q, n_kv = -(-q.shape[2] // block_q), -(-k.shape[2] // block_kv)
    shape = (*(q.shape[:2] if case.plan == "own" else (1, 1)), n_q)
    indices = torch.rand(*shape, n_kv, generator=generator).argsort(-1).int()
    width = 0 if case.plan == "none" else n_kv - 1 if case.plan == "much" else max(1, n_kv // 4)
    indices = indices[..., :width]
    counts = torch.full(shape, width, dtype=torch.int32)
    if case.plan not in ("none", "much"):
        counts = torch.randint(width + 1, shape, generator=generator, dtype=torch.int32)
    if case.plan == "dense":
        counts[..., ::3] = n_kv
    elif case.plan == "wrong":
        counts[..., ::2], indices[..., 0] = -3, 1000
        counts[..., -1] = 10**6
        indices[..., -1:] = -7
    settings = (case.sparsity, case.recall_threshold, scale, block_q, block_kv, mask, rank)
    return q, k, lse, counts, indices, *settings


def check(out: tuple[torch.Tensor, ...], args: tuple[Any, ...], scores: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compare masses and scores with the fp64 reference, and the choice with what it chooses by these very scores."""
    from dynamicrad_compile.kernels.search_arguments import Search
    from dynamicrad_compile.kernels.search_reference import choose_reference, scores_reference

    s = Search(*args)
    mass, score = scores_reference(s)
    mass_cases.check_close(scores[0], mass, s.mass)
    # The gap of two masses is as exact as these.
    assert bool(((scores[1].double() - score).abs() <= 2 * mass_cases.tolerance(s.mass) * mass + 1e-30).all())
    counts, indices, recall = choose_reference(s, *scores)
    assert [x.dtype for x in out] == [torch.int32, torch.int32, torch.float32]
    assert torch.equal(out[0], counts)
    assert torch.equal(out[1], indices)
    torch.testing.assert_close(out[2].double(), recall, rtol=1e-5, atol=1e-6)


def interpret(name: str, rank: str) -> tuple[torch.Tensor, ...]:
    """Choice, masses and scores of a case."""
    from dynamicrad_compile.kernels._launch import INTERPRETED

    assert INTERPRETED, "set TRITON_INTERPRET=1"
    return launched(build(case_of(name), rank))


def launched(args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Choice, masses and scores of the Triton kernels."""
    from dynamicrad_compile.kernels.search_arguments import MAX_MASS, Search
    from dynamicrad_compile.kernels.search_op import outputs
    from dynamicrad_compile.kernels.search_triton import launch_choice, launch_scores

    s = Search(*args)
    out = outputs(s)
    mass, held, n_keys = found = launch_scores(s)
    launch_choice(s, found, *out)
    mass, held = mass.clamp(max=MAX_MASS), held.clamp(max=MAX_MASS)
    score = mass if s.rank == "mass" else (mass - n_keys[:, None, None].float() * held).clamp(min=0)
    return *out, mass, score
