"""Compensation by covariances: the formula written out, its gradient, its cost, and the option of the backend."""

from __future__ import annotations

import pytest
import torch
from support.attention_cases import BF16, CASES, HALF, Case, build
from support.graphs import OPTIONS, drad, first_output, relative_error
from support.marks import INNER
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from zoo.exports import make

from dynamicrad_compile.kernels import moments, moments_cpu
from dynamicrad_compile.kernels.attention_arguments import Attention
from dynamicrad_compile.kernels.moments_reference import second_order_attention_reference as reference
from dynamicrad_compile.plans.cost import covariances

OP = torch.ops.dynamicrad.second_order_attention
ATTENTION = torch.ops.dynamicrad.block_sparse_attention
COMPENSATED = [case for case in CASES if case.compensate is not None]
BY_NAME = {case.name: case for case in CASES}
TOLERANCE = {torch.float32: (2e-5, 5e-6), HALF: (2e-3, 1e-3), BF16: (1.6e-2, 8e-3)}  # as attention_cases.check


@pytest.mark.parametrize("case", COMPENSATED, ids=str)
def test_the_formula(case: Case):
    args = build(case)
    out, lse = OP(*args)
    expected, expected_lse = reference(*args)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    rtol, atol = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    exact = case.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5 if exact else 2e-3, atol=1e-5 if exact else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", COMPENSATED, ids=str)
def test_the_formula_on_cuda(case: Case):
    args = build(case)
    out, lse = OP(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in args))
    expected, expected_lse = reference(*args)
    rtol, atol = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", [case for case in COMPENSATED if case.dtype == torch.float32], ids=str)
def test_its_gradient(case: Case):
    args = build(case)
    wanted = [x.detach().double().requires_grad_() for x in args[:3]]
    got = [x.detach().clone().requires_grad_() for x in args[:3]]
    generator = torch.Generator().manual_seed(1)
    out, lse = reference(*wanted, *args[3:])
    grad, grad_lse = (torch.randn(x.shape, generator=generator) for x in (out, lse))
    seen = ~lse.isinf()

    def gradients(leaves, out, lse):
        return torch.autograd.grad((out * grad).sum() + (lse * grad_lse)[seen].sum(), leaves, allow_unused=True)

    expected = gradients(wanted, out, lse)
    for name, a, b in zip("qkv", gradients(got, *OP(*got, *args[3:])), expected, strict=True):
        assert a.isfinite().all(), name
        b = torch.zeros_like(a) if b is None else b
        assert (a - b).abs().max() <= 2e-5 * b.abs().max().clamp(min=1e-6), name


def test_a_plan_that_keeps_everything_is_dense_attention():
    q, k, v = torch.randn(3, 2, 2, 101, 16)
    plan = drad.BlockPlan.from_mask(torch.ones(4, 4, dtype=torch.bool), block_q=32, block_kv=32, q_len=101, kv_len=101)
    given = (plan.kv_counts, plan.kv_indices, None, 32, 32, None, torch.ones(1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(OP(q, k, v, *given)[0], dense, rtol=1e-5, atol=3e-6)


def forward_and_gradients(args: tuple) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in args[:3]]
    out, lse = OP(*leaves, *args[3:])
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse[~lse.isinf()].sum(), leaves)]


@pytest.mark.parametrize("name", ["mean_gqa", "mean_per_batch_and_head", "mean_mask_random"])
def test_a_little_at_a_time_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    """One head, and a few columns of keys, at a time."""
    args = build(BY_NAME[name])
    expected = forward_and_gradients(args)
    monkeypatch.setattr(moments, "MOMENT_BYTES", 1)
    monkeypatch.setattr(moments_cpu, "SLICE_BYTES", 1)
    monkeypatch.setattr(moments_cpu, "LEAST_COLUMNS", 3)
    for got, want in zip(forward_and_gradients(args), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mean_gqa", "mean_ragged", "mean_mask_random"])
def test_the_plain_operations_of_the_gradient_are_the_fused_ones(name: str):
    """What the backward computes again, and what exports hold, against the workers of the CPU."""
    args = build(BY_NAME[name])
    a = Attention(*args)
    growth, shift = moments.growth_and_shift(a, moments.moments_of(a))
    dropped, lse = torch.ops.dynamicrad.means_attention(*args)
    parts = (*ATTENTION(*args[:9], None), dropped + shift, lse + growth.log().squeeze(-1))
    for got, want in zip(drad.merge_states(*parts), OP(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mean_gqa", "mean_per_sample", "mean_mask_random", "mean_bf16"])
def test_opcheck(name: str):
    args = list(build(BY_NAME[name]))
    args[:3] = [x.detach().requires_grad_() for x in args[:3]]
    for op in (OP.default, torch.ops.dynamicrad.second_order_attention_cpu.default):
        torch.library.opcheck(op, args)
    out, lse = (x.detach() for x in OP(*args))
    results = (out, lse, torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape))
    given = [*(x.detach() for x in args[:3]), *results, *args[3:]]
    backward = torch.ops.dynamicrad.second_order_attention_backward
    for op in (backward.default, torch.ops.dynamicrad.second_order_attention_backward_cpu.default):
        torch.library.opcheck(op, given)


def test_int8_scores_are_near_exact_ones():
    args = build(BY_NAME["mean_ragged"])
    (out, lse), (exact, exact_lse) = OP(*args, qk_int8=True), OP(*args)
    seen = ~exact_lse.isinf()
    assert 0 < (out - exact).norm() < 0.02 * exact.norm()
    torch.testing.assert_close(lse[seen], exact_lse[seen], rtol=0, atol=0.05)


@pytest.mark.parametrize("dense", [True, False], ids=["dense_step", "weight_0"])
def test_where_nothing_is_dropped_no_moments_are_computed(dense: bool, monkeypatch: pytest.MonkeyPatch):
    """A step gated to dense counts, or a sample whose weight is 0, costs what plain attention costs."""
    q, k, v, counts, indices, *rest, weight = build(BY_NAME["mean_ragged"])
    counts = torch.full_like(counts, 4) if dense else counts
    args = (q, k, v, counts, indices, *rest, weight if dense else torch.zeros(1))

    def refuse(*_):
        raise AssertionError("moments of nothing")

    monkeypatch.setattr(moments_cpu.BlockMoments, "__init__", refuse)
    for got, want in zip(OP(*args), ATTENTION(*args[:9], None), strict=True):
        assert torch.equal(got, want)
    with FlopCounterMode(display=False) as counter:
        OP(*args)
    with FlopCounterMode(display=False) as plain:
        ATTENTION(*args[:9], None)
    assert counter.get_total_flops() == plain.get_total_flops()


def test_argument_of_the_function():
    q, k, v = torch.randn(3, 1, 2, 101, 16)
    mask = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    plan = drad.BlockPlan.from_mask(mask, block_q=32, block_kv=32, q_len=101, kv_len=101)
    given = (q, k, v, plan.kv_counts, plan.kv_indices, None, 32, 32, None, torch.tensor([0.7]))
    got = drad.block_sparse_attention(q, k, v, plan, compensate=0.7, covariance=True, return_lse=True)
    for a, b in zip(got, OP(*given), strict=True):
        assert torch.equal(a, b)
    plain = drad.block_sparse_attention(q, k, v, plan, compensate=0.0)
    assert torch.equal(drad.block_sparse_attention(q, k, v, plan, compensate=0.0, covariance=True), plain)


def test_large_scores_do_not_overflow():
    args = list(build(BY_NAME["mean_ragged"]))
    args[:3] = [100 * x for x in args[:3]]
    out, lse = OP(*args)
    assert out.isfinite().all()
    expected, expected_lse = reference(*args)
    assert relative_error(out, expected) < 1e-4
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)


def test_what_covariances_cost_is_what_is_counted():
    """The products that are added to those of compensation, against `covariances`; whole blocks, so exact."""
    q, k, v = torch.randn(3, 1, 2, 256, 16)
    mask = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    plan = drad.BlockPlan.from_mask(mask, block_q=32, block_kv=32, q_len=256, kv_len=256)
    given = (q, k, v, plan.kv_counts, plan.kv_indices, None, 32, 32, None, torch.ones(1))
    totals = []
    for op in (OP, ATTENTION):
        with FlopCounterMode(display=False) as counter:
            op(*given)
        totals.append(counter.get_total_flops())
    dense = 4 * 2 * 256 * 256 * 16
    assert totals[0] - totals[1] == covariances(16, 256, 32, 32) * dense


@pytest.fixture(scope="module")
def wan():
    """A model of one layer."""
    return make("wan", 1)


def compiled(wan, **options):
    """(output, report) of the compiled model."""
    model, kwargs = wan
    given = {**OPTIONS, "sparsity": 0.7, "compensate": 1.0, **options}
    sparse = torch.compile(model, backend="dynamicrad", options=given, fullgraph=True)
    with torch.no_grad():
        found = first_output(sparse(**kwargs)), drad.report(sparse)
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("inner", INNER)
def test_option_covariance(inner: str, wan):
    """Nearer to dense than means alone, the same from both inner compilers; the report takes its cost off."""
    means, plain = compiled(wan, inner=inner)
    out, found = compiled(wan, inner=inner, covariance=True)
    eager, _ = compiled(wan, covariance=True, inner="eager")
    assert relative_error(out, eager) < 1e-5
    dense = first_output(wan[0](**wan[1]))
    assert relative_error(out, dense) < relative_error(means, dense)
    site, before = found.replaced[0], plain.replaced[0]
    block = site.plan.block_kv
    cost = covariances(site.shape[3], site.shape[2], block, block)
    assert site.sparsity == pytest.approx(before.sparsity - cost)


def test_a_plan_that_compensates_nothing_says_that_covariance_does_nothing(wan):
    out, found = compiled(wan, compensate=0.0, covariance=True)
    plain, _ = compiled(wan, compensate=0.0)
    assert torch.equal(out, plain)
    assert "covariance does nothing here" in str(found)


def test_training_through_it_matches_eager(wan):
    model, kwargs = wan
    grads = []
    for inner in ("eager", "aot_eager"):
        options = {**OPTIONS, "sparsity": 0.7, "compensate": 1.0, "covariance": True, "inner": inner}
        run = torch.compile(model, backend="dynamicrad", options=options)
        model.zero_grad()
        first_output(run(**kwargs)).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch._dynamo.reset()
    assert relative_error(*grads) < 1e-5


@pytest.mark.slow
def test_symbolic_sizes(wan):
    """One graph for several lengths, each as if compiled for it alone."""
    model, kwargs = wan
    inputs = [{**kwargs, "hidden_states": torch.randn(1, 4, frames, 12, 18)} for frames in (5, 7)]
    alone = [compiled((model, given), covariance=True, inner="eager")[0] for given in inputs]
    options = {**OPTIONS, "sparsity": 0.7, "compensate": 1.0, "covariance": True, "inner": "aot_eager"}
    run = torch.compile(model, backend="dynamicrad", options=options)
    for given, expected in zip(inputs, alone, strict=True):
        torch._dynamo.mark_dynamic(given["hidden_states"], 2)
        with torch.no_grad():
            assert relative_error(first_output(run(**given)), expected) < 1e-5
    assert len(drad.report(run).graphs) == 1


def test_it_traces_for_cuda_where_there_is_none():
    """Every dtype, with and without a key mask: no operation asks for a device."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with FakeTensorMode():
            q, k, v = (torch.empty(2, 4, 101, 16, dtype=dtype, device="cuda") for _ in range(3))
            counts = torch.empty(1, 1, 4, dtype=torch.int32, device="cuda")
            indices = torch.empty(1, 1, 4, 3, dtype=torch.int32, device="cuda")
            weight, mask = torch.ones(1, device="cuda"), torch.ones(2, 101, dtype=torch.bool, device="cuda")
            for hidden in (None, mask):
                out, lse = OP(q, k, v, counts, indices, None, 32, 32, hidden, weight)
                assert (out.dtype, out.shape, lse.dtype) == (dtype, q.shape, torch.float32)


@pytest.mark.slow
def test_export_with_covariances(wan, tmp_path):
    """A torch program, run in a fresh process, gives what the compiled model gives."""
    options = {**OPTIONS, "sparsity": 0.7, "compensate": 1.0, "covariance": True}
    done = drad.export(wan[0], (), wan[1], tmp_path / "wan", "torch", options, check=True)
    assert done.card["check"]["relative_error"] < 1e-5
