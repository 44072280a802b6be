"""Attention alone: dense by each backend of PyTorch, block-sparse by ours, FlexAttention with the same blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dynamicrad_compile as drad
from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels.attention_arguments import Attention, Results
from dynamicrad_compile.plans.plan import BlockPlan

from . import variants
from .bench import Bench, active_pairs
from .roofline import attention_work, roofline
from .runner import Row, Unsupported, Values
from .timing import peak_memory

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CPU_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION}
# Of the result at full size, for some blocks of queries, against float32: the rounding of half precision.
SAMPLE_BOUND = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def dense_row(bench: Bench, tokens: int, dim: int) -> Row:
    """Every dense backend at one length and head_dim."""
    run = lambda: run_dense(bench, tokens, dim)  # noqa: E731
    return Row(f"dense/{tokens}/{dim}", "dense", run, seconds=4.0, facts=_facts(bench, tokens, dim))


def forward_row(bench: Bench, tokens: int, dim: int, sparsity: float) -> Row:
    """Our op at one length, head_dim and sparsity."""
    name = f"forward/{tokens}/{dim}/{sparsity:g}"
    run = lambda: run_forward(bench, tokens, dim, sparsity)  # noqa: E731
    return Row(name, "forward", run, seconds=2.0, facts={**_facts(bench, tokens, dim), "wanted_sparsity": sparsity})


def flex_rows(bench: Bench, tokens: int, dim: int, sparsities: tuple[float, ...]) -> Iterator[Row]:
    """FlexAttention with the blocks of our rows; the first compiles for the shape."""
    for number, sparsity in enumerate(sparsities):
        name = f"flex/{tokens}/{dim}/{sparsity:g}"
        run = lambda s=sparsity: run_flex(bench, tokens, dim, s)  # noqa: E731
        facts = {**_facts(bench, tokens, dim), "wanted_sparsity": sparsity}
        yield Row(name, "flex", run, seconds=3.0 if number else 12.0, facts=facts)


def backward_row(bench: Bench, tokens: int, dim: int, sparsity: float) -> Row:
    """Backward of our op and of each dense backend."""
    name = f"backward/{tokens}/{dim}/{sparsity:g}"
    run = lambda: run_backward(bench, tokens, dim, sparsity)  # noqa: E731
    return Row(name, "backward", run, seconds=10.0, facts={**_facts(bench, tokens, dim), "wanted_sparsity": sparsity})


def backward_form_rows(bench: Bench, tokens: int, dim: int, sparsity: float) -> Iterator[Row]:
    """The backward's own kernels by each form; after `backward_row`, whose dense times it takes."""
    for kernel in variants.BACKWARD:
        name = f"backward/{tokens}/{dim}/{sparsity:g}/{kernel}"
        run = lambda k=kernel: run_backward_form(bench, tokens, dim, sparsity, k)  # noqa: E731
        facts = {**_facts(bench, tokens, dim), "wanted_sparsity": sparsity, "kernel": kernel}
        yield Row(name, "backward", run, seconds=6.0, facts=facts)


def _facts(bench: Bench, tokens: int, dim: int) -> Values:
    grid, heads = bench.shapes[tokens]
    return {"tokens": tokens, "grid": list(grid), "heads": heads, "head_dim": dim, "dtype": str(bench.dtype)[6:]}


def each_backend(bench: Bench, make: Callable[[], Callable[[], Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds by backend of the calls that `make` gives inside each backend, and why the others have none."""
    times: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, backend in (CPU_BACKENDS if bench.device == "cpu" else BACKENDS).items():
        with sdpa_kernel(backend), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")  # PyTorch warns of each reason for which a backend can't serve
            try:
                times[name] = bench.clock.time(make()).ms
            except (RuntimeError, torch.OutOfMemoryError) as error:
                why = "; ".join(dict.fromkeys(str(w.message).split("(Triggered")[0].strip() for w in said))
                missing[name] = " ".join((why or str(error)).split())[:200]
    return times, missing


def run_dense(bench: Bench, tokens: int, dim: int) -> Values:
    """ms of each backend, the best of them, its TFLOP/s."""
    q, k, v = bench.qkv(tokens, dim)
    times, missing = each_backend(bench, lambda: lambda: F.scaled_dot_product_attention(q, k, v))
    if not times:
        raise Unsupported(f"no dense backend runs: {missing}")
    best = min(times, key=lambda name: times[name])
    flops = 4.0 * tokens**2 * dim * bench.shapes[tokens][1]
    return {
        "backends_ms": times, "missing": missing, "best": best, "ms": times[best],
        "tflops": flops / times[best] * 1e-9,
        "memory_bytes": peak_memory(lambda: F.scaled_dot_product_attention(q, k, v), bench.device),
    }  # fmt: skip


def run_forward(bench: Bench, tokens: int, dim: int, sparsity: float) -> Values:
    """Time, rate on active blocks, gains over dense, roofline, memory, and the error of a sample of the output."""
    plan, heads = bench.plan(tokens, sparsity), bench.shapes[tokens][1]
    q, k, v = bench.qkv(tokens, dim)
    call = lambda: drad.block_sparse_attention(q, k, v, plan)  # noqa: E731
    error = sample_error(q, k, v, plan, call())
    if not error <= SAMPLE_BOUND[bench.dtype]:
        raise AssertionError(f"error {error:.3g} of a sample of the output is above {SAMPLE_BOUND[bench.dtype]:g}")
    values = {**bench.timed(call), "error": error, "sparsity": plan.sparsity, "tile": tile_of(bench, dim)}
    pairs = active_pairs(plan, heads)
    work = attention_work(pairs, tokens, tokens, heads, dim, q.element_size(), (values["tile"] or [128])[0])
    values |= {"tflops": work.flops / values["ms"] * 1e-9, **roofline(work, values["ms"], bench.ceilings)}
    values["memory_bytes"] = peak_memory(call, bench.device)
    dense = bench.found(f"dense/{tokens}/{dim}")
    ideal = 1.0 / max(1.0 - plan.sparsity, 1e-9)
    values |= {"ideal": ideal, "best_dense": None, "best_dense_ms": None, "gain": None, "of_ideal": None, "over": {}}
    if dense:
        gain = dense["ms"] / values["ms"]
        values |= {"best_dense": dense["best"], "best_dense_ms": dense["ms"], "gain": gain, "of_ideal": gain / ideal}
        values["over"] = {name: ms / values["ms"] for name, ms in dense["backends_ms"].items()}
    return values


def run_flex(bench: Bench, tokens: int, dim: int, sparsity: float) -> Values:
    """FlexAttention, compiled, on the same tensors and blocks; its time over ours."""
    from torch.nn.attention.flex_attention import flex_attention

    if not bench.codegen:
        raise Unsupported("FlexAttention looks at blocks in generated code only (--inductor)")
    plan, heads = bench.plan(tokens, sparsity), bench.shapes[tokens][1]
    q, k, v = bench.qkv(tokens, dim)
    mask = plan.to_block_mask()
    shape = (tokens, dim)
    if shape not in bench.flex:  # one at a time, or the limit of recompilations is reached
        torch._dynamo.reset()
        bench.flex.clear()
        # fullgraph: an error rather than eager code, which would ignore the blocks
        bench.flex[shape] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    compiled = bench.flex[shape]
    call = lambda: compiled(q, k, v, block_mask=mask)  # noqa: E731
    error = sample_error(q, k, v, plan, call())
    if not error <= SAMPLE_BOUND[bench.dtype]:
        raise AssertionError(f"FlexAttention did something else: error {error:.3g} of a sample of its output")
    timing = bench.clock.time(call)
    ours = bench.found(f"forward/{tokens}/{dim}/{sparsity:g}")
    return {
        "ms": timing.ms, "spread": timing.spread, "repeats": timing.repeats, "error": error, "sparsity": plan.sparsity,
        "tflops": 4.0 * active_pairs(plan, heads) * dim / timing.ms * 1e-9,
        "over_flex": timing.ms / ours["ms"] if ours else None,
    }  # fmt: skip


def run_backward(bench: Bench, tokens: int, dim: int, sparsity: float) -> Values:
    """Time of the gradients of q, k and v alone; five matrix products count for the rate, as is usual."""
    plan, heads = bench.plan(tokens, sparsity), bench.shapes[tokens][1]
    q, k, v = bench.qkv(tokens, dim, grad=True)
    grad = torch.randn_like(q)

    def gradients(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        out = forward()
        return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    ours = gradients(lambda: drad.block_sparse_attention(q, k, v, plan))
    timing = bench.clock.time(ours)
    values: Values = {
        "ms": timing.ms, "spread": timing.spread, "repeats": timing.repeats, "sparsity": plan.sparsity,
        "tflops": 10.0 * active_pairs(plan, heads) * dim / timing.ms * 1e-9,
        "memory_bytes": peak_memory(ours, bench.device),
    }  # fmt: skip
    times, missing = each_backend(bench, lambda: gradients(lambda: F.scaled_dot_product_attention(q, k, v)))
    values |= {"backends_ms": times, "missing": missing, "gain": None, "ideal": 1.0 / max(1.0 - plan.sparsity, 1e-9)}
    if times:
        best = min(times, key=lambda name: times[name])
        gain = times[best] / timing.ms
        values |= {"best_dense": best, "best_dense_ms": times[best], "gain": gain, "of_ideal": gain / values["ideal"]}
    return values


def run_backward_form(bench: Bench, tokens: int, dim: int, sparsity: float, kernel: str) -> Values:
    """Time of the backward's kernels in one form, called without autograd."""
    plan, heads = bench.plan(tokens, sparsity), bench.shapes[tokens][1]
    q, k, v = bench.qkv(tokens, dim)
    given = Attention(q, k, v, plan.kv_counts, plan.kv_indices, None, plan.block_q, plan.block_kv)
    out, lse = variants.forward(given, variants.tile_for(given, "triton"))
    results = Results(out, lse, torch.randn_like(out), torch.zeros_like(lse))
    call = lambda: variants.backward(given, results, kernel)  # noqa: E731
    timing = bench.clock.time(call)
    dense = bench.found(f"backward/{tokens}/{dim}/{sparsity:g}") or {}
    best_ms = dense.get("best_dense_ms")
    return {
        "ms": timing.ms, "spread": timing.spread, "repeats": timing.repeats, "sparsity": plan.sparsity,
        "tflops": 10.0 * active_pairs(plan, heads) * dim / timing.ms * 1e-9,
        "memory_bytes": peak_memory(call, bench.device), "best_dense": dense.get("best_dense", "-"),
        "best_dense_ms": best_ms, "gain": best_ms / timing.ms if best_ms else None,
    }  # fmt: skip


def sample_error(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, out: Tensor) -> float:
    """Relative error of the first, a middle and the last block of queries, first and last head, against float32."""
    worst = 0.0
    for head in {0, q.shape[1] - 1}:
        keys, values = k[0, head].float(), v[0, head].float()
        for row in {0, plan.num_q_blocks // 2, plan.num_q_blocks - 1}:
            count = int(plan.kv_counts[0, 0, row])
            ids = plan.kv_indices[0, 0, row, :count].long()
            if count >= plan.num_kv_blocks:
                ids = torch.arange(plan.num_kv_blocks, device=q.device)
            tokens = (ids[:, None] * plan.block_kv + torch.arange(plan.block_kv, device=q.device)).flatten()
            tokens = tokens[tokens < plan.kv_len]
            own = slice(row * plan.block_q, (row + 1) * plan.block_q)
            scores = q[0, head, own].float() @ keys[tokens].T * q.shape[-1] ** -0.5
            expected = scores.double().softmax(-1) @ values[tokens].double()
            error = (out[0, head, own].double() - expected).norm() / expected.norm().clamp_min(1e-30)
            worst = max(worst, float(error)) if torch.isfinite(error) else float("nan")
    return worst


def tile_of(bench: Bench, dim: int) -> list[int] | None:
    """[block_m, block_n, warps, stages, kernel] of the forward here; None on the CPU or where it can't be told."""
    if bench.device == "cpu":
        return None
    try:
        tile = variants.current_tile(bench.dtype, dim)
    except PlanError:
        return None
    return [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, tile.kernel]
