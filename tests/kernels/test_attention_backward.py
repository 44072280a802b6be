"""The gradient of dynamicrad::block_sparse_attention on CPU: exact, deterministic, and it compiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.attention_cases import CASES, Case, build, build_plan
from support.backward_cases import build_backward, check_gradients, expected_gradients
from support.marks import slow
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels import attention_backward_cpu, pieces_cpu, transpose_plan
from dynamicrad_compile.kernels.attention_backward_reference import block_sparse_attention_backward_reference
from dynamicrad_compile.kernels.attention_reference import block_sparse_attention_reference
from dynamicrad_compile.plans.attention import block_sparse_attention
from dynamicrad_compile.plans.plan import BlockPlan

FORWARD = torch.ops.dynamicrad.block_sparse_attention
OP = torch.ops.dynamicrad.block_sparse_attention_backward
BY_NAME = {case.name: case for case in CASES}


def random_plan(length: int, block: int = 32, keep: float = 0.5) -> BlockPlan:
    n = -(-length // block)
    mask = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < keep
    mask[:, 0] = True
    return BlockPlan.from_mask(mask, block_q=block, block_kv=block, q_len=length, kv_len=length)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


# ---- the transposed plan


@pytest.mark.parametrize("name", ["ragged_both", "cross_lengths", "gqa_per_head", "per_batch_and_head"])
@pytest.mark.parametrize("sort_bytes", [1 << 28, 1], ids=["at_once", "head_by_head"])
def test_transposed_plan(name: str, sort_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transpose_plan, "SORT_BYTES", sort_bytes)
    case = BY_NAME[name]
    plan = build_plan(case, torch.Generator().manual_seed(3))
    counts, indices = transpose_plan.transpose_plan(plan.kv_counts, plan.kv_indices, plan.num_kv_blocks)
    mask = plan.block_mask()
    assert counts.dtype == indices.dtype == torch.int32
    assert indices.shape == (*counts.shape, mask.shape[-2])
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        p, h, j = at
        readers = mask[p, h, :, j].nonzero()[:, 0].tolist()
        n = int(counts[p, h, j])
        assert indices[p, h, j, :n].tolist() == readers
        assert (indices[p, h, j, n:] == 0).all()


# ---- the formula


class Formula(torch.autograd.Function):
    """The fp64 references of forward and backward as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, *arguments):
        ctx.save_for_backward(q, k, v)
        ctx.arguments = arguments
        out, lse = block_sparse_attention_reference(q, k, v, *arguments)
        # A query without a key has lse -inf, of which no finite difference exists.
        return out, torch.where(torch.isneginf(lse), 0.0, lse)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        grads = block_sparse_attention_backward_reference(*ctx.saved_tensors, grad_out, grad_lse, *ctx.arguments)
        return (*grads, *[None] * len(ctx.arguments))


TINY = [
    Case("tiny", q_len=11, kv_len=13, dim=3, block_q=4, block_kv=4),
    Case("tiny_gqa", heads=4, plan_heads=4, q_len=9, kv_len=9, dim=2, block_q=4, block_kv=4),
    Case("tiny_mask", mask="random", q_len=9, kv_len=11, dim=3, block_q=4, block_kv=4),
    Case("tiny_mean", compensate=(0.6,), q_len=11, kv_len=13, dim=3, block_q=4, block_kv=4),
    Case("tiny_mean_mask", compensate=(1.0, 0.0), batch=2, mask="random", q_len=9, kv_len=11, dim=2, block_q=4,
         block_kv=4),
]  # fmt: skip


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck_of_the_formula(case: Case):
    q, k, v, *plan = build(case)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    arguments = tuple(plan)
    assert torch.autograd.gradcheck(lambda *x: Formula.apply(*x, *arguments), inputs)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_mean"])
def test_formula_agrees_with_autograd(name: str):
    weight = torch.tensor([0.6]) if name == "tiny_mean" else None
    inputs = leaves((1, 4, 11, 3), (1, 2, 11, 3), (1, 2, 11, 3), dtype=torch.float64)
    plan = random_plan(11, block=4)
    arguments = (plan.kv_counts, plan.kv_indices, None, 4, 4, None, weight)
    out, lse = block_sparse_attention_reference(*inputs, *arguments)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    with torch.no_grad():
        got = block_sparse_attention_backward_reference(*inputs, grad_out, grad_lse, *arguments)
    for grad, want in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, want)


# ---- the CPU path


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case):
    args = build_backward(case)
    grads = OP(*args)
    for grad in grads:
        assert grad.is_contiguous()
        assert grad.dtype == case.dtype
    check_gradients(grads, args)


@pytest.mark.parametrize("name", ["ragged_both", "gqa_per_head", "mask_random", "bf16", "mean_gqa", "mean_mask_random"])
def test_small_budgets_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    """Pieces of one query block, one key head at a time."""
    monkeypatch.setattr(pieces_cpu, "SCORE_BYTES", 1)
    monkeypatch.setattr(attention_backward_cpu, "COPY_BYTES_PER_WORKER", 1)
    args = build_backward(BY_NAME[name])
    check_gradients(OP(*args), args)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["per_batch_and_head", "mean_gqa"])
def test_every_thread_number_is_exact_and_deterministic(name: str, threads: int):
    args, before = build_backward(BY_NAME[name]), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first = OP(*args)
        check_gradients(first, args)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(OP(*args), first, strict=True))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# ---- autograd


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("length", [128, 131], ids=["even", "ragged"])
def test_keep_everything_equals_sdpa(length: int, kv_heads: int):
    inputs = leaves((2, 4, length, 40), (2, kv_heads, length, 40), (2, kv_heads, length, 40))
    out = block_sparse_attention(*inputs, random_plan(length, keep=2.0))
    expected = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    grad = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(x, inputs, grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("use", ["out", "lse", "both"])
@pytest.mark.parametrize("compensate", [None, 0.8])
def test_gradients_of_each_output(use: str, compensate: float | None):
    inputs = leaves(*[(2, 3, 101, 16)] * 3)
    plan = random_plan(101)
    out, lse = block_sparse_attention(*inputs, plan, compensate=compensate, return_lse=True)
    weights = [torch.randn_like(x) if use in (name, "both") else torch.zeros_like(x)
               for name, x in (("out", out), ("lse", lse))]  # fmt: skip
    loss = sum((x * w).sum() for x, w, name in zip((out, lse), weights, ("out", "lse"), strict=True)
               if use in (name, "both"))  # fmt: skip
    got = torch.autograd.grad(loss, inputs)
    numbers = (plan.kv_counts, plan.kv_indices, None, 32, 32, None)
    weight = None if compensate is None else torch.tensor([compensate])
    check_gradients(got, (*(x.detach() for x in inputs), out, lse, *weights, *numbers, weight))


def test_only_what_needs_a_gradient_gets_one():
    q, k, v = leaves(*[(1, 2, 64, 16)] * 3)
    block_sparse_attention(q, k.detach(), v.detach(), random_plan(64)).sum().backward()
    assert q.grad is not None
    assert k.grad is None


def test_autocast_does_not_narrow_the_products():
    inputs = leaves(*[(1, 2, 101, 16)] * 3)
    plan = random_plan(101)
    expected = torch.autograd.grad(block_sparse_attention(*inputs, plan).square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(block_sparse_attention(*inputs, plan).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_second_derivative_is_refused():
    inputs = leaves(*[(1, 2, 64, 16)] * 3)
    out = block_sparse_attention(*inputs, random_plan(64))
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grads[0].sum().backward()


# ---- tracing


@pytest.mark.parametrize(
    "name", ["ragged_both", "gqa_per_head", "permuted", "sliced", "mask_random", "bf16", "mean_mask_random"]
)
def test_opcheck(name: str):
    args = list(build(BY_NAME[name]))
    args[:3] = [x.detach().requires_grad_() for x in args[:3]]
    torch.library.opcheck(FORWARD.default, args)
    for op in (OP.default, torch.ops.dynamicrad.block_sparse_attention_backward_cpu.default):
        torch.library.opcheck(op, build_backward(BY_NAME[name]))


class Block(torch.nn.Module):
    """A small attention layer whose q, k, v are strided views of one projection."""

    def __init__(self, plan: BlockPlan, compensate: float | None) -> None:
        super().__init__()
        self.plan, self.compensate = plan, compensate
        self.proj = torch.nn.Linear(48, 144)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in self.proj(x).chunk(3, -1))
        out = block_sparse_attention(q, k, v, self.plan, compensate=self.compensate)
        return x + out.transpose(1, 2).flatten(2)


class Checkpointed(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def step(model: torch.nn.Module, compiled, x: torch.Tensor) -> list[torch.Tensor]:
    """[out, gradients of x and of the model's parameters]"""
    x = x.clone().requires_grad_()
    out = compiled(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("wrap", [lambda m: m, Checkpointed], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(("backend", "compensate"), [("eager", None), ("aot_eager", 0.8), slow("inductor", None)])
def test_compiles_in_training_mode(backend: str, compensate: float | None, wrap):
    torch.manual_seed(0)
    model, x = Block(random_plan(101), compensate), torch.randn(2, 101, 48)
    compiled = torch.compile(wrap(model), backend=backend, fullgraph=True)
    expected = step(model, model, x)
    for got in (step(model, wrap(model), x), step(model, compiled, x)):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_compiles_with_a_dynamic_batch():
    torch.manual_seed(0)
    model = Block(random_plan(101), 0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 101, 48)
        for a, b in zip(step(model, compiled, x), step(model, model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


# ---- FLOPs and errors


def test_flops_are_five_products():
    args = build_backward(BY_NAME["ragged_both"])
    with FlopCounterMode(display=False) as forward:
        FORWARD(*args[:3], *args[7:])
    with FlopCounterMode(display=False) as backward:
        OP(*args)
    assert 2 * backward.get_total_flops() == 5 * forward.get_total_flops() > 0


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (3, torch.zeros(1, 2, 100, 32), r"expected out \[1, 2, 101, 32\]"),
        (4, torch.zeros(1, 2, 101, 1), r"expected lse torch.float32 \[1, 2, 101\]"),
        (5, torch.zeros(1, 2, 101, 32).double(), "expected grad_out torch.float32"),
        (6, torch.zeros(1, 2, 100), r"expected grad_lse \[1, 2, 101\]"),
        (10, 16, "101 queries in blocks of 16 make 7 rows"),
    ],
    ids=["out", "lse", "grad_out", "grad_lse", "block_q"],
)
def test_wrong_arguments(position: int, value, message: str):
    args = list(build_backward(BY_NAME["ragged_both"]))
    args[position] = value
    with pytest.raises(PlanError, match=message):
        OP(*args)


def test_expected_gradients_of_a_row_without_keys_are_zero():
    """The references themselves, where they take a branch of their own."""
    args = build_backward(BY_NAME["mask_all"])
    dq, dk, dv = expected_gradients(args)
    assert (dq[0] == 0).all()
    assert (dk[0] == 0).all()
    assert (dv[0] == 0).all()
    assert (dq[1] != 0).any()
