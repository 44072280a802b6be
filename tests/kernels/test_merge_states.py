"""dynamicrad::merge_states: exact, differentiable, and quiet about rows without a key."""

from __future__ import annotations

import pytest
import torch

import dynamicrad_compile as drad

INF = float("inf")


def attention(q, k, v, keep=None):
    """(out, lse) of dense attention over the keys `keep` (a slice), differentiable."""
    k, v = (x if keep is None else x[:, :, keep] for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v, torch.logsumexp(scores, -1)


def leaves(dtype=torch.float64):
    return [torch.randn(2, 3, n, 8, dtype=dtype).requires_grad_() for n in (7, 11, 11)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_halves_are_the_whole(dtype):
    inputs = leaves(dtype)
    parts = [attention(*inputs, keep) for keep in (slice(0, 4), slice(4, None))]
    merged, whole = drad.merge_states(*parts[0], *parts[1]), attention(*inputs)
    grads = [torch.autograd.grad(out.square().sum() + lse.sin().sum(), inputs) for out, lse in (merged, whole)]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for got, want in zip((*merged, *grads[0]), (*whole, *grads[1]), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_order_does_not_matter():
    inputs = leaves()
    a, b, c = (attention(*inputs, keep) for keep in (slice(0, 2), slice(2, 7), slice(7, None)))
    left = drad.merge_states(*drad.merge_states(*a, *b), *c)
    right = drad.merge_states(*a, *drad.merge_states(*c, *b))
    for got, want in zip(left, right, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("compensate", [None, 0.5])
def test_sparse_attention_over_two_halves(compensate):
    """Splitting the blocks of a plan in two, with gradients. Only one half may speak for the dropped blocks."""
    q, k, v = (torch.randn(1, 2, 100, 16).requires_grad_() for _ in range(3))
    mask = torch.rand(4, 4) < 0.6
    mask[0] = False
    first, kept = torch.tensor([True, False, True, False]), torch.arange(100) // 32 % 2 == 0

    def plan(mask):
        return drad.BlockPlan.from_mask(mask, block_q=32, block_kv=32, q_len=100, kv_len=100)

    def run(mask, keys=None):
        return drad.block_sparse_attention(q, k, v, plan(mask), kv_mask=keys, compensate=compensate, return_lse=True)

    whole = run(mask)
    if compensate is None:
        merged = drad.merge_states(*run(mask & first), *run(mask & ~first))
    else:  # hidden blocks have no mean
        merged = drad.merge_states(*run(mask, kept[None]), *run(mask, ~kept[None]))
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    has_key = ~torch.isneginf(whole[1])
    losses = [out.square().sum() + lse[has_key].sin().sum() for out, lse in (merged, whole)]
    grads = [torch.autograd.grad(loss, (q, k, v), retain_graph=True) for loss in losses]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_rows_without_keys():
    out_a, out_b = torch.randn(4, 8), torch.randn(4, 8)
    out_a[1], out_b[2], out_a[3], out_b[3] = torch.nan, torch.inf, torch.nan, torch.nan
    lse_a, lse_b = torch.tensor([0.3, -INF, 1.0, -INF]), torch.tensor([0.1, 2.0, -INF, -INF])
    inputs = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = drad.merge_states(*inputs)
    torch.testing.assert_close(out[1:3], torch.stack([out_b[1], out_a[2]]))
    assert (out[3] == 0).all()
    torch.testing.assert_close(lse, torch.logaddexp(lse_a, lse_b))
    grads = torch.autograd.grad((out * torch.randn(4, 8)).sum() + lse[:3].sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[3] == 0).all() for grad in grads)


def test_gradcheck():
    shapes = ((2, 3, 4), (2, 3), (2, 3, 4), (2, 3))
    inputs = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(drad.merge_states, inputs)
    assert torch.autograd.gradgradcheck(drad.merge_states, inputs)


def test_far_apart_scores_do_not_overflow():
    out_a, out_b = torch.randn(2, 8), torch.randn(2, 8)
    lse_a, lse_b = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    out, lse = drad.merge_states(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out, torch.stack([out_a[0], out_b[1]]))
    assert torch.equal(lse, torch.tensor([1e4, 1e4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    inputs = [x.detach().float() for x in leaves()]
    (out_a, lse_a), (out_b, lse_b) = (attention(*inputs, keep) for keep in (slice(0, 4), slice(4, None)))
    out, lse = drad.merge_states(out_a.to(dtype), lse_a, out_b.to(dtype), lse_b)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), attention(*inputs)[0], rtol=1e-2, atol=1e-2)


def test_compiles_and_passes_opcheck():
    args = [
        x.requires_grad_() for x in (torch.randn(2, 5, 8), torch.randn(2, 5), torch.randn(2, 5, 8), torch.randn(2, 5))
    ]
    torch.library.opcheck(torch.ops.dynamicrad.merge_states.default, args)
    compiled = torch.compile(drad.merge_states, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*args), drad.merge_states(*args), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: torch.zeros(2, 4)}, "expected out_a and out_b"),
        ({2: torch.zeros(2, 5, 9)}, "expected out_a and out_b"),
        ({0: torch.zeros(2, 5, 8).half()}, "must share a dtype"),
        ({1: torch.zeros(2, 5).double()}, "must share a dtype"),
        ({i: torch.zeros(2, 5, 8, dtype=torch.int32) for i in (0, 2)}, "expected floating point"),
    ],
    ids=["lse_shape", "out_shape", "out_dtype", "lse_dtype", "integers"],
)
def test_wrong_arguments(changes, message):
    args = [torch.zeros(2, 5, 8), torch.zeros(2, 5), torch.zeros(2, 5, 8), torch.zeros(2, 5)]
    for position, value in changes.items():
        args[position] = value
    with pytest.raises(drad.PlanError, match=message):
        drad.merge_states(*args)
