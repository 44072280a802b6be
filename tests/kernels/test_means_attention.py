"""The op dynamicrad::means_attention: attention over the means of dropped blocks alone, its gradient, its FLOPs."""

from __future__ import annotations

import pytest
import torch
from support.attention_cases import CASES, Case, build, check, check_result
from support.backward_cases import build_backward
from torch.utils.flop_counter import FlopCounterMode

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels import means_attention_cpu as cpu
from dynamicrad_compile.kernels.attention_reference import means_attention_reference

OP = torch.ops.dynamicrad.means_attention
BACKWARD = torch.ops.dynamicrad.means_attention_backward
BY_NAME = {case.name: case for case in CASES if case.compensate is not None}


def with_results(name: str) -> tuple:
    """Positional arguments of the backward op."""
    q, k, v, _, _, grad_out, grad_lse, *plan = build_backward(BY_NAME[name])
    out, lse = OP(q, k, v, *plan)
    return (q, k, v, out, lse, grad_out, grad_lse, *plan)


@pytest.mark.parametrize("case", BY_NAME.values(), ids=str)
def test_matches_reference(case: Case):
    args = build(case)
    check_result(OP(*args), args, case, means_alone=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", BY_NAME.values(), ids=str)
def test_cuda_matches_reference(case: Case):
    args = build(case)
    out, lse = OP(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in args))
    check(out.cpu(), lse.cpu(), args, case.dtype, means_alone=True)


@pytest.mark.parametrize("budget", [None, 1], ids=["whole", "row_by_row"])
@pytest.mark.parametrize("name", ["mean_ragged", "mean_per_sample", "mean_gqa", "mean_mask_random", "mean_many_blocks"])
def test_gradient(name: str, budget: int | None, monkeypatch: pytest.MonkeyPatch):
    if budget is not None:
        monkeypatch.setattr(cpu, "SCORE_BYTES", budget)
    args = build(BY_NAME[name])
    grad_out, grad_lse = build_backward(BY_NAME[name])[5:7]

    def gradients(function, *inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out, lse = function(*leaves, *args[3:])
        return torch.autograd.grad((out * grad_out).sum() + (lse * grad_lse)[~lse.isinf()].sum(), leaves)

    expected = gradients(means_attention_reference, *args[:3])
    for a, b in zip(gradients(OP, *args[:3]), expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_int8_scores_are_near_exact_ones():
    args = build(BY_NAME["mean_ragged"])
    (out, lse), (exact, exact_lse) = OP(*args, qk_int8=True), OP(*args)
    seen = ~exact_lse.isinf()
    assert 0 < (out - exact).norm() < 0.02 * exact.norm()
    torch.testing.assert_close(lse[seen], exact_lse[seen], rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["mean_gqa", "mean_per_sample", "mean_mask_random", "mean_bf16"])
def test_opcheck(name: str):
    args = list(build(BY_NAME[name]))
    args[:3] = [x.detach().requires_grad_() for x in args[:3]]
    for op in (OP.default, torch.ops.dynamicrad.means_attention_cpu.default):
        torch.library.opcheck(op, args)
    for op in (BACKWARD.default, torch.ops.dynamicrad.means_attention_backward_cpu.default):
        torch.library.opcheck(op, with_results(name))


def test_flops_are_those_of_the_means():
    """One mean for each block; rows that are dense and samples of weight 0 read none."""
    args = build(BY_NAME["mean_per_sample"])
    q, counts, weight = args[0], args[3], args[9]
    m_k = -(-args[1].shape[2] // args[7])
    rows = (counts < m_k).repeat_interleave(args[6], -1)[..., : q.shape[2]] & (weight > 0)[:, None, None]
    pairs = m_k * int(rows.expand(q.shape[0], q.shape[1], -1).sum())
    with FlopCounterMode(display=False) as forward:
        OP(*args)
    with FlopCounterMode(display=False) as backward:
        BACKWARD(*with_results("mean_per_sample"))
    assert forward.get_total_flops() == 4 * q.shape[3] * pairs
    assert backward.get_total_flops() >= 10 * q.shape[3] * pairs


def test_the_means_alone_need_a_weight():
    args = build(BY_NAME["mean_even"])
    for op in (OP, torch.ops.dynamicrad.second_order_attention):
        with pytest.raises(PlanError, match="means_attention needs compensate"):
            op(*args[:9], None)
