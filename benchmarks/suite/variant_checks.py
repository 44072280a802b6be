"""Correctness of each form of the forward and backward kernels, by the cases of `correctness`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dynamicrad_compile.kernels.attention_arguments import Attention, Results
from dynamicrad_compile.plans.plan import BlockPlan

from . import correctness, variants
from .correctness import Case
from .runner import Row


def rows(device: str, reduced: bool) -> Iterator[Row]:
    """All forms of a case before the next case; the usual cases first."""
    for case in correctness.FORWARD:
        for kernel in variants.FORWARD:
            if not reduced or case.name in correctness.REDUCED:
                run = lambda c=case, k=kernel: correctness.check_forward(c, device, _forward(k))  # noqa: E731
                yield _row("forward", kernel, case, run)
    for case in correctness.BACKWARD:
        for kernel in variants.BACKWARD:
            if not reduced or case.name in correctness.REDUCED:
                run = lambda c=case, k=kernel: correctness.check_backward(c, device, _gradients(k))  # noqa: E731
                yield _row("backward", kernel, case, run)
    yield from (row for row in correctness.rows(device, reduced) if row.facts["kernel"] not in ("forward", "backward"))


def _row(direction: str, kernel: str, case: Case, run: Any) -> Row:
    facts = {"kernel": f"{direction} {kernel}", "case": case.name, "head_dim": case.dim, "dtype": str(case.dtype)[6:]}
    return Row(f"correct/{direction}_{kernel}/{case.name}", "correctness", run, 4.0, facts)


def _given(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, mask: Any, weights: Any, device: str) -> Attention:
    moved = [None if x is None else x.to(device) for x in (mask, weights)]
    plan = plan.to(device)
    operands = [x.to(device) for x in (q, k, v)]
    return Attention(*operands, plan.kv_counts, plan.kv_indices, None, plan.block_q, plan.block_kv, *moved)


def _forward(kernel: str) -> correctness.Forward:
    def call(*arguments: Any) -> tuple[Tensor, Tensor]:
        a = _given(*arguments)
        return variants.checked_forward(a, variants.tile_for(a, kernel))

    return call


def _gradients(kernel: str) -> correctness.Gradients:
    """The backward by this form, of results of the plain forward."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, mask: Any, weights: Any, grad: Tensor, device: str
    ) -> Any:
        a = _given(q, k, v, plan, mask, weights, device)
        out, lse = variants.forward(a, variants.tile_for(a, "triton"))
        return variants.backward(a, Results(out, lse, grad.to(device), torch.zeros_like(lse)), kernel)

    return call
