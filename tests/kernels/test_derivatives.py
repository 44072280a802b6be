"""Derivatives of the ops under torch.func: right in reverse mode and under vmap, an error where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import dynamicrad_compile as drad

PLAN = drad.make_plan("dynamicrad", (3, 4, 8), 16, sparsity=0.5, compensate=1.0)
Q, K, V, TANGENT = torch.randn(4, 2, 2, 96, 16, generator=torch.Generator().manual_seed(0))
TABLES = (PLAN.kv_counts, PLAN.kv_indices)
OPS = {
    "attention": lambda q: drad.block_sparse_attention(q, K, V, PLAN, compensate=0.0),
    "compensated": lambda q: drad.block_sparse_attention(q, K, V, PLAN),
    "covariance": lambda q: drad.block_sparse_attention(q, K, V, PLAN, covariance=True),
    "lse": lambda q: drad.block_sparse_attention(q, K, V, PLAN, return_lse=True)[1],
    "keys and values": lambda q: drad.block_sparse_attention(Q, q, q.square(), PLAN),
    "means": lambda q: torch.ops.dynamicrad.means_attention(q, K, V, *TABLES, None, 16, 16, None, torch.ones(1))[0],
    "pooled": lambda q: torch.ops.dynamicrad.pool_blocks(q, 16)[0],
    "merged": lambda q: drad.merge_states(q, q[..., 0], V, V[..., 0])[0],
}
REFUSED = [name for name in OPS if name != "merged"]  # that is plain ATen operations
each = pytest.mark.parametrize("name", OPS)
each_refused = pytest.mark.parametrize("name", REFUSED)


def loss(name):
    return lambda q: OPS[name](q).sin().sum()


def gradient(name, q=Q):
    q = q.clone().requires_grad_()
    return torch.autograd.grad(loss(name)(q), q)[0]


@each
def test_reverse_mode(name):
    want = gradient(name)
    torch.testing.assert_close(torch.func.grad(loss(name))(Q), want)
    torch.testing.assert_close(torch.func.vjp(loss(name), Q)[1](torch.tensor(1.0))[0], want)
    along = torch.func.jacrev(lambda s: loss(name)(Q + s * TANGENT))(torch.zeros(()))
    torch.testing.assert_close(along, (want * TANGENT).sum(), rtol=1e-4, atol=1e-4)


@each
def test_batches(name):
    several = torch.stack([Q, 2 * Q])
    torch.testing.assert_close(torch.vmap(OPS[name])(several), torch.stack([OPS[name](q) for q in several]))
    want = torch.stack([gradient(name, q) for q in several])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss(name)))(several), want)
    shared = torch.func.grad(lambda q: torch.vmap(loss(name))(torch.stack([q, 2 * q])).sum())(Q)
    torch.testing.assert_close(shared, want[0] + 2 * want[1])


@each_refused
def test_forward_mode_is_refused(name):
    f = OPS[name]
    for derivative in (
        lambda: torch.func.jvp(f, (Q,), (TANGENT,)),
        lambda: torch.func.jacfwd(lambda s: f(Q + s * TANGENT))(torch.zeros(())),
        lambda: torch.func.hessian(lambda s: f(Q + s * TANGENT).sum())(torch.zeros(())),
        lambda: torch.func.jvp(torch.func.grad(loss(name)), (Q,), (TANGENT,)),
        lambda: torch.func.jvp(torch.vmap(f), (Q[None],), (TANGENT[None],)),
    ):
        with pytest.raises(drad.DerivativeError, match=r"has no forward-mode derivative .*Use reverse mode"):
            derivative()
    with forward_ad.dual_level():
        with pytest.raises(drad.DerivativeError, match="forward-mode"):
            f(forward_ad.make_dual(Q, TANGENT))
        torch.testing.assert_close(f(Q), f(Q))  # no tangent, nothing to refuse


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "pooled"])
def test_second_derivatives_are_refused(name):
    q = Q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(name)(q), q, create_graph=True)
    torch.testing.assert_close(first.detach(), gradient(name))
    with pytest.raises(drad.DerivativeError, match="has no second derivative"):
        torch.autograd.grad(first.sum(), q)
    with pytest.raises(drad.DerivativeError, match="has no second derivative"):
        torch.func.grad(lambda q: torch.func.grad(loss(name))(q).sum())(Q)


def test_a_linear_op_has_second_derivatives():
    def twice(f):
        return torch.func.grad(lambda q: torch.func.grad(lambda x: f(x).sin().sum())(q).sum())(Q)

    torch.testing.assert_close(twice(OPS["pooled"]), twice(lambda q: q.unflatten(2, (-1, 16)).mean(3)))


def test_a_choice_of_blocks_has_no_derivative_and_takes_none_away():
    candidates = drad.make_plan("dynamicrad", (3, 4, 8), 16, sparsity=0.3)
    tables = (candidates.kv_counts, candidates.kv_indices, *[torch.ones_like(candidates.kv_counts)] * 2)

    def choose(q):
        return torch.ops.dynamicrad.select_blocks(q, K, *tables, torch.zeros(1, 2), None, 16, 16, "threshold")[0]

    q = Q.clone().requires_grad_()
    assert not choose(q).requires_grad
    _, tangent = torch.func.jvp(lambda q: (choose(q) * q[:, :, :6, 0]).sum(), (Q,), (TANGENT,))
    torch.testing.assert_close(tangent, (choose(Q) * TANGENT[:, :, :6, 0]).sum())
