"""What several test files need: capturing passes, dense references with a block mask, relative errors."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from zoo.models import ZOO, out_tensors

import dynamicrad_compile as drad
from dynamicrad_compile.passes import Decisions, Dense, PassContext, PlannedSite, run_passes
from dynamicrad_compile.plans.table import PlanTable
from support.plain import PLAIN


def plan_each(build_plan):
    """A policy: each video gets the BlockPlan or PlanTable of `build_plan(video)`; None leaves it dense."""

    def decision(video):
        plan = build_plan(video)
        if plan is None:
            return Dense(None)
        return PlannedSite(video, PlanTable.of(plan) if isinstance(plan, drad.BlockPlan) else plan)

    return lambda videos, conditions: Decisions([decision(video) for video in videos])


def capture(fn, *args, grid=None, build_plan=lambda site: None, training=False, dynamic=None, **kwargs):
    """Run the passes on every graph of `fn`; returns [(context, graph module)], the graphs run as rewritten."""
    captured = []

    def backend(gm, example_inputs):
        context = PassContext(plan_each(build_plan), grid, training, example_inputs)
        run_passes(gm, context)
        captured.append((context, gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return captured


def sites_of(captured):
    return [site for context, _ in captured for site in context.sites]


def targets(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def make(name, **sizes):
    return ZOO[name](**sizes)


def first_output(out):
    return out_tensors(out)[0]


def relative_error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@contextmanager
def masked_dense(plan):
    """Inside, every self-attention over the plan's sequence is dense attention under the plan's block mask."""

    def places(order, length):
        return torch.arange(length) if order is None else order[0].argsort()

    rows = places(plan.query_order, plan.q_len) // plan.block_q
    cols = places(plan.order, plan.kv_len) // plan.block_kv
    allowed = plan.block_mask()[0, 0][rows][:, cols]

    class Masked(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if func in (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention):
                query = kwargs.get("query", args[0] if args else None)
                key = kwargs.get("key", args[1] if len(args) > 1 else None)
                if query.shape[-2] == plan.q_len and key.shape[-2] == plan.kv_len:
                    mask = kwargs.pop("attn_mask", None)
                    mask = allowed if mask is None else mask & allowed
                    return func(*args, **kwargs, attn_mask=mask)
            return func(*args, **kwargs)

    with Masked(), torch.no_grad():
        yield


OPTIONS = {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "inner": "eager"}


def compile_sparse(model, **options):
    return torch.compile(model, backend="dynamicrad", options={**OPTIONS, **options}, fullgraph=True)


def call(model, kwargs):
    with torch.no_grad():
        return first_output(model(**kwargs))


def dynamic_batch(kwargs):
    batch = torch.export.Dim("batch", min=1, max=64)
    return {
        name: {0: batch} if isinstance(value, torch.Tensor) and name != "image_rotary_emb" else
        tuple(None for _ in value) if isinstance(value, tuple) else None
        for name, value in kwargs.items()
    }  # fmt: skip


__all__ = [
    "OPTIONS",
    "call",
    "capture",
    "compile_sparse",
    "drad",
    "dynamic_batch",
    "first_output",
    "make",
    "masked_dense",
    "plan_each",
    "relative_error",
    "sites_of",
    "targets",
]
