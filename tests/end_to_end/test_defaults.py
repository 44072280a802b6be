"""The main paths give the same under other process-wide defaults."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.graphs import compile_sparse, drad, first_output, make
from support.marks import slow

from dynamicrad_compile.kernels import moments_op as _registers_the_ops  # noqa: F401
from dynamicrad_compile.plans.patterns import PATTERNS
from dynamicrad_compile.quality import metrics
from dynamicrad_compile.runtime.router import Router
from dynamicrad_compile.tuning import proxy

STEPS = (900.5, 900.5, 700.25, 700.25, 500.125)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


def same(one, other):
    torch._dynamo.reset()
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


MODELS = [
    dict(sparsity=0.6, dense_steps=1),
    dict(mode="dynamic_threshold", refresh_steps=2, covariance=True, compensate=0.5),
    dict(router=Router(torch.randn(3, 16), torch.zeros(3))),
]


@pytest.mark.parametrize("default", ["bfloat16", slow("float64")])
@pytest.mark.parametrize("options", MODELS, ids=lambda options: next(iter(options)))
def test_a_model(default, options):
    model, kwargs, _ = make("wan_t2v")

    def run():
        compiled = compile_sparse(model, block_size=16, inner="eager", **options)
        with torch.no_grad(), drad.generation():
            outputs = [
                first_output(compiled(**{**kwargs, "timestep": torch.tensor([timestep], dtype=torch.float32)}))
                for timestep in STEPS
            ]
        return [*outputs, torch.tensor(drad.report(compiled).replaced[0].sparsity, dtype=torch.float64)]

    expected = run()
    with DEFAULTS[default]():
        found = run()
    assert same(found, expected)


class Plain(torch.nn.Module):
    """One attention, and a timestep that is embedded; makes no tensor but from its inputs.

    Under another default device Dynamo can't trace `unflatten`.
    """

    def __init__(self):
        super().__init__()
        self.time = torch.nn.Linear(2, 32)

    def forward(self, x, timestep):
        time = self.time(torch.cat([timestep[:, None].sin(), timestep[:, None].cos()], 1))
        q = (x.flatten(2).transpose(1, 2) + time[:, None]).reshape(1, -1, 2, 16).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("compiler", ["torch.compile", "drad.compile"])
def test_a_model_under_another_default_device(default, compiler):
    model, x = Plain(), torch.randn(1, 32, 5, 6, 8)
    options = dict(block_size=16, min_tokens=0, inner="eager", sparsity=0.6, dense_steps=1)

    def run():
        plain = torch.compile(model, backend="dynamicrad", options=options)
        compiled = drad.compile(model, **options) if compiler == "drad.compile" else plain
        with torch.no_grad(), drad.generation():
            timesteps = [torch.tensor([t], dtype=torch.float32, device="cpu") for t in STEPS]
            return [compiled(x, timestep) for timestep in timesteps]

    expected = run()
    with DEFAULTS[default]():
        found = run()
    assert same(found, expected)


def plans():
    for pattern in (name for name, one in PATTERNS.items() if one.needs != "search"):
        for plan in (drad.make_plan(pattern, (5, 6, 8), 16), drad.make_plan(pattern, (3, 4, 5), 32, 2, 3)):
            yield from (plan.kv_counts, plan.kv_indices, plan.block_mask())
            yield torch.tensor(plan.sparsity, dtype=torch.float64, device="cpu")
    mask = torch.eye(4, dtype=torch.bool, device="cpu")
    yield drad.BlockPlan.from_mask(mask, block_q=16, block_kv=16, q_len=60, kv_len=60).kv_indices


def op():
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 240, 16, generator=generator, dtype=torch.float32, device="cpu")
    plan = drad.make_plan("dynamicrad", (5, 6, 8), 16, sparsity=0.6, compensate=0.5)
    lengths = torch.tensor([240, 200], device="cpu")
    for options in (dict(), dict(kv_length=lengths), dict(covariance=True)):
        q.requires_grad_()
        out = drad.block_sparse_attention(q, k, v, plan, **options)
        (grad,) = torch.autograd.grad(out.square().sum(), q)
        yield from (out.detach(), grad)


def scene():
    for group in proxy.structured((5, 6, 8), 2, 16, 0):
        yield from group if isinstance(group, (tuple, list)) else (group,)


def quality():
    generator = torch.Generator("cpu").manual_seed(0)
    clips = torch.rand(2, 2, 5, 3, 16, 16, generator=generator, dtype=torch.float32, device="cpu")
    yield from (torch.as_tensor(value) for value in (metrics.psnr(*clips), metrics.ssim(*clips)))


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("path", [plans, op])
def test_parts(default, path):
    expected = list(path())
    with DEFAULTS[default]():
        found = list(path())
    assert same(found, expected)
