"""What comes beside the attention: selection, search, router, plan, compensation; each as a share of the attention."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

import dynamicrad_compile as drad
from dynamicrad_compile.kernels.attention_arguments import Attention
from dynamicrad_compile.kernels.blocks import cdiv
from dynamicrad_compile.kernels.means import means_of
from dynamicrad_compile.kernels.search_op import cost as search_cost
from dynamicrad_compile.kernels.select_criteria import RANKS
from dynamicrad_compile.kernels.select_op import cost
from dynamicrad_compile.plans.cost import covariances
from dynamicrad_compile.plans.make import make_candidates, make_plan
from dynamicrad_compile.plans.order import inverse, reordered
from dynamicrad_compile.plans.plan import BlockPlan
from dynamicrad_compile.plans.ratios import ratios_for
from dynamicrad_compile.plans.selection import select_blocks
from dynamicrad_compile.runtime.router import route

from .bench import BLOCK, Bench
from .runner import Row, Unsupported, Values

THRESHOLDS = {"threshold": (0.0, 0.5), "mass": (0.8, 0.7)}
CANDIDATES = 0.5  # sparsity of the candidates that a selection thins to 0.8


def rows(bench: Bench, tokens: int, dim: int, sparsity: float) -> Iterator[Row]:
    """All overheads at one shape; the forward row of that shape and sparsity must have run before."""
    facts = {"tokens": tokens, "head_dim": dim, "heads": bench.shapes[tokens][1], "wanted_sparsity": sparsity}
    at = f"{tokens}/{dim}/{sparsity:g}"
    for criterion, rank in (("ratio", "mass"), ("ratio", "error"), ("threshold", "mass"), ("mass", "mass")):
        run = lambda c=criterion, r=rank: run_select(bench, tokens, dim, sparsity, c, r)  # noqa: E731
        by = criterion if rank == "mass" else f"{criterion} by {rank}"
        yield Row(f"select/{at}/{by.replace(' ', '_')}", "overhead", run, 5.0,
                  {**facts, "what": f"select_blocks, {by}"})  # fmt: skip
    for rank in RANKS:
        yield Row(f"search/{at}/by_{rank}", "overhead", lambda r=rank: run_search(bench, tokens, dim, sparsity, r), 5.0,
                  {**facts, "what": f"search_blocks by {rank}, at the steps that search"})  # fmt: skip
    yield Row(f"compensation/{at}", "overhead", lambda: run_compensation(bench, tokens, dim, sparsity), 6.0,
              {**facts, "what": "compensation (means and kernel)"})  # fmt: skip
    yield Row(f"covariance/{at}", "overhead", lambda: run_covariance(bench, tokens, dim, sparsity), 6.0,
              {**facts, "what": "compensation by covariances"})  # fmt: skip
    yield Row(f"order/{at}", "overhead", lambda: run_order(bench, tokens, dim, sparsity), 4.0,
              {**facts, "what": "tokens into boxes and back, not fused"})  # fmt: skip
    yield Row(f"gather/{at}", "overhead", lambda: run_gather(bench, tokens, dim, sparsity), 8.0,
              {**facts, "what": "tokens of boxes, read through the order"})  # fmt: skip
    yield Row(f"int8/{at}", "overhead", lambda: run_int8(bench, tokens, dim, sparsity), 6.0,
              {**facts, "what": "scores from int8 instead (below 0: faster)"})  # fmt: skip
    yield Row(f"router/{at}", "overhead", lambda: run_router(bench, at), 3.0, {**facts, "what": "router, once a step"})
    yield Row(f"plan/{at}", "overhead", lambda: run_plan(bench, tokens, sparsity, at), 3.0,
              {**facts, "what": "plan on the host, once a grid"})  # fmt: skip


def _share(bench: Bench, at: str, ms: float) -> Values:
    """Share of the sparse attention's time at the same shape."""
    attention = bench.found(f"forward/{at}")
    return {"ms": ms, "attention_ms": attention["ms"] if attention else None,
            "share": ms / attention["ms"] if attention else None}  # fmt: skip


def run_select(bench: Bench, tokens: int, dim: int, sparsity: float, criterion: str, rank: str) -> Values:
    """select_blocks: read q and k once, choose among the candidates."""
    q, k, _ = bench.qkv(tokens, dim)
    grid, heads = bench.shapes[tokens]
    candidates = make_candidates(grid, BLOCK, sparsity=CANDIDATES)
    pair = THRESHOLDS.get(criterion) or ratios_for(candidates, sparsity)
    candidates, thresholds = candidates.to(bench.device), torch.tensor([pair]).to(bench.device)
    call = lambda: select_blocks(q, k, candidates, thresholds, criterion, rank=rank)  # noqa: E731
    plan = call()
    width = candidates.plan.kv_indices.shape[-1]
    sizes = (1, heads, heads, tokens, tokens, dim, BLOCK, BLOCK, width)
    floor = cost(*sizes, criterion, q.element_size(), rank).bytes
    values = _share(bench, f"{tokens}/{dim}/{sparsity:g}", bench.clock.time(call).ms)
    values |= {"sparsity": plan.sparsity, "floor_ms": floor / bench.ceilings.memory * 1e-9, "bound": "memory"}
    return values | {"of_floor": values["floor_ms"] / values["ms"]}


def run_search(bench: Bench, tokens: int, dim: int, sparsity: float, rank: str) -> Values:
    """search_blocks: the scores of all pairs and the choice, as a share of dense attention; half of it is the bound."""
    q, k, _ = bench.qkv(tokens, dim)
    n, heads = cdiv(tokens, BLOCK), q.shape[1]
    own = torch.arange(n, dtype=torch.int32, device=bench.device)[None, None, :, None]
    counts = torch.ones(1, 1, n, dtype=torch.int32, device=bench.device)
    lse = torch.full(q.shape[:3], float(tokens), device=bench.device).log_()
    call = lambda: torch.ops.dynamicrad.search_blocks(  # noqa: E731
        q, k, lse, counts, own, sparsity, 1.0, None, BLOCK, BLOCK, None, rank
    )
    dense = bench.found(f"dense/{tokens}/{dim}")
    sizes = (1, heads, heads, tokens, tokens, dim, BLOCK, BLOCK, q.element_size())
    work = {"tensor": search_cost(*sizes, rank, adaptive=False).flops, "exp": heads * tokens**2}
    rates = {"tensor": bench.ceilings.tensor, "exp": bench.ceilings.exp}
    floors = {part: work[part] / rate * 1e-9 for part, rate in rates.items() if rate}
    bound = max(floors, key=lambda part: floors[part])
    ms = bench.clock.time(call).ms
    values = {**_share(bench, f"{tokens}/{dim}/{sparsity:g}", ms), "floor_ms": floors[bound], "bound": bound}
    of_dense = f"{ms / dense['ms']:.1%} of dense" if dense else "dense was not measured"
    return {**values, "of_floor": floors[bound] / ms, "summary": of_dense}


def run_compensation(bench: Bench, tokens: int, dim: int, sparsity: float) -> Values:
    """What compensation adds to the attention with the same blocks, and how much of it the means take."""
    plan = bench.plan(tokens, sparsity)
    q, k, v = bench.qkv(tokens, dim)
    with_means = replace(plan, compensate=(1.0,))
    weight = torch.ones(1, device=bench.device)
    given = Attention(q, k, v, plan.kv_counts, plan.kv_indices, None, BLOCK, BLOCK, None, weight)
    both = bench.clock.time_in_turns({
        "plain": lambda: drad.block_sparse_attention(q, k, v, plan),
        "whole": lambda: drad.block_sparse_attention(q, k, v, with_means),
    })  # fmt: skip
    plain, whole = both["plain"].ms, both["whole"].ms
    means = bench.clock.time(lambda: means_of(given)).ms
    return {"ms": whole - plain, "attention_ms": plain, "share": (whole - plain) / plain, "means_ms": means,
            "summary": f"means {means:.3g} ms, rest {whole - plain - means:.3g} ms"}  # fmt: skip


def run_covariance(bench: Bench, tokens: int, dim: int, sparsity: float) -> Values:
    """What `covariance=True` adds to attention that compensates by means; the floor is what its kernels move."""
    plan = replace(bench.plan(tokens, sparsity), compensate=(1.0,))
    q, k, v = bench.qkv(tokens, dim)
    both = bench.clock.time_in_turns({
        "means": lambda: drad.block_sparse_attention(q, k, v, plan),
        "covariances": lambda: drad.block_sparse_attention(q, k, v, plan, covariance=True),
    })  # fmt: skip
    added = both["covariances"].ms - both["means"].ms
    extra = covariances(dim, tokens, BLOCK, BLOCK)
    # k, v; q and out of the means' pass; q, two results and out of the last one; C and A, written and read.
    moved = (8 * tokens + 4 * cdiv(tokens, BLOCK) * dim) * dim * q.shape[1] * q.element_size()
    floor = moved / bench.ceilings.memory * 1e-9
    return {"ms": added, "attention_ms": both["means"].ms, "share": added / both["means"].ms, "floor_ms": floor,
            "bound": "memory", "of_floor": floor / added, "summary": f"{extra:.1%} of dense products"}  # fmt: skip


def run_order(bench: Bench, tokens: int, dim: int, sparsity: float) -> Values:
    """q, k, v into the order of boxes and the output back, as four passes; in a graph RoPE and projection do most."""
    order = _in_boxes(bench, tokens, sparsity).order
    assert order is not None
    back = inverse(order)
    q, k, v = bench.qkv(tokens, dim)
    call = lambda: [*(reordered(x, order) for x in (q, k, v)), reordered(q, back)]  # noqa: E731
    values = _share(bench, f"{tokens}/{dim}/{sparsity:g}", bench.clock.time(call).ms)
    floor = 8 * q.numel() * q.element_size() / bench.ceilings.memory * 1e-9
    return {**values, "floor_ms": floor, "bound": "memory", "of_floor": floor / values["ms"]}


def run_gather(bench: Bench, tokens: int, dim: int, sparsity: float) -> Values:
    """What a token order adds to the attention with the same blocks: rows gathered by the kernel, and copies."""
    if bench.device == "cpu":
        raise Unsupported("the CUDA kernel gathers")
    from dynamicrad_compile.kernels.attention_triton import launch_forward

    plan = _in_boxes(bench, tokens, sparsity)
    order = plan.order
    assert order is not None
    back, places = inverse(order), order[0].to(torch.int32)
    q, k, v = bench.qkv(tokens, dim)
    inside = [reordered(x, order) for x in (q, k, v)]
    given = Attention(q, k, v, plan.kv_counts, plan.kv_indices, None, BLOCK, BLOCK)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return launch_forward(given._replace(q=q, k=k, v=v))[0]

    def copied() -> torch.Tensor:
        return reordered(call(*(reordered(x, order) for x in (q, k, v))), back)

    def gathered() -> torch.Tensor:
        return launch_forward(given, places=places)[0]

    error = float((gathered().float() - copied().float()).norm() / copied().float().norm())
    if not error < 1e-2:
        raise AssertionError(f"error {error:.3g} of gathered rows against copied ones")
    timed = bench.clock.time_in_turns({"plain": lambda: call(*inside), "copied": copied, "gathered": gathered})
    plain, copies, whole = (timed[name].ms for name in ("plain", "copied", "gathered"))
    return {"ms": whole - plain, "attention_ms": plain, "share": (whole - plain) / plain, "copied_ms": copies - plain,
            "copied_share": (copies - plain) / plain, "error": error,
            "summary": f"as copies {copies - plain:.3g} ms, {(copies - plain) / plain:.1%}"}  # fmt: skip


def _in_boxes(bench: Bench, tokens: int, sparsity: float) -> BlockPlan:
    plan = make_plan("dynamicrad", bench.shapes[tokens][0], BLOCK, sparsity=sparsity, box=(BLOCK // 16, 4, 4))
    return plan.to(bench.device)


def run_int8(bench: Bench, tokens: int, dim: int, sparsity: float) -> Values:
    """What `qk_dtype="int8"` adds to the time, rounding included, and its error against exact scores."""
    plan = bench.plan(tokens, sparsity)
    q, k, v = bench.qkv(tokens, dim)
    exact = drad.block_sparse_attention(q, k, v, plan).float()
    rounded = drad.block_sparse_attention(q, k, v, plan, qk_dtype="int8").float()
    error = float((rounded - exact).norm() / exact.norm())
    if not error < 0.05:
        raise AssertionError(f"error {error:.3g} of int8 scores against exact ones")
    both = bench.clock.time_in_turns({
        "exact": lambda: drad.block_sparse_attention(q, k, v, plan),
        "int8": lambda: drad.block_sparse_attention(q, k, v, plan, qk_dtype="int8"),
    })  # fmt: skip
    change = both["int8"].ms - both["exact"].ms
    return {"ms": change, "attention_ms": both["exact"].ms, "share": change / both["exact"].ms, "error": error,
            "summary": f"error {error:.2%}"}  # fmt: skip


def run_router(bench: Bench, at: str) -> Values:
    """The linear router on a prompt of 512 tokens of 4096 features and its negative."""
    embeds = torch.randn(2, 512, 4096, device=bench.device, dtype=bench.dtype)
    weight, bias = torch.randn(3, 4096, device=bench.device), torch.zeros(3, device=bench.device)
    call = lambda: route(embeds, None, weight, bias)  # noqa: E731
    timed = bench.timed(call)
    return {**_share(bench, at, timed["graph_ms"] or timed["ms"]), "eager_ms": timed["ms"]}


def run_plan(bench: Bench, tokens: int, sparsity: float, at: str) -> Values:
    """Seconds of the planner on the host; nothing of it is paid again at a later step."""
    start = time.perf_counter()
    drad.make_plan("dynamicrad", bench.shapes[tokens][0], BLOCK, sparsity=sparsity, compensate=1.0)
    return _share(bench, at, 1e3 * (time.perf_counter() - start))
