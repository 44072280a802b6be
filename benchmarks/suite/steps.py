"""A whole block and a whole step of a Wan2.1-14B-shaped transformer: torch.compile dense against backend "dynamicrad".

Dense runs with whichever dense backend was fastest at that length in this run. Both sides have the same weights and
inputs. The ideal is 1 / (1 - share x sparsity), with attention's share of the FLOPs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

import dynamicrad_compile as drad
from dynamicrad_compile.backend import dynamicrad

from .attention import BACKENDS
from .bench import Bench
from .model import LATENT_CHANNELS, TINY, WAN_14B, Block, Shape, VideoTransformer, rope_tables
from .runner import Row, Values
from .timing import peak_memory


def rows(bench: Bench, tokens: int, sparsity: float, layers: int) -> Iterator[Row]:
    """The block, the step, and the step with blocks chosen from queries and keys."""
    shape = replace(TINY if bench.reduced else WAN_14B, layers=layers)
    facts = {"tokens": tokens, "grid": list(bench.shapes[tokens][0]), "width": shape.width, "wanted_sparsity": sparsity}
    yield Row(f"block/{tokens}", "steps", lambda: run_block(bench, shape, tokens, sparsity), 45.0,
              {**facts, "what": "block"})  # fmt: skip
    step = {**facts, "layers": layers}
    yield Row(f"step/{tokens}/static", "steps", lambda: run_step(bench, shape, tokens, sparsity, "static_ratio"), 55.0,
              {**step, "what": f"step of {layers} layers"})  # fmt: skip
    run = lambda: run_step(bench, shape, tokens, sparsity, "dynamic_threshold")  # noqa: E731
    yield Row(f"step/{tokens}/dynamic", "steps", run, 40.0,
              {**step, "what": f"step of {layers} layers, blocks by content"})  # fmt: skip


def run_block(bench: Bench, shape: Shape, tokens: int, sparsity: float) -> Values:
    """One layer; its grid is given, since the latents are outside."""
    grid = bench.shapes[tokens][0]
    model = _on_device(bench, lambda: Block(shape))
    text = torch.randn(1, shape.text_tokens, shape.width, device=bench.device, dtype=bench.dtype)
    x = torch.randn(1, tokens, shape.width, device=bench.device, dtype=bench.dtype)
    modulation = torch.randn(1, 6, shape.width, device=bench.device, dtype=bench.dtype) / 10
    inputs = (x, text, modulation, *(y.to(bench.dtype) for y in rope_tables(grid, shape.head_dim, bench.device)))
    return _both(bench, model, inputs, shape, tokens, {"sparsity": sparsity, "grid": grid}, 1)


def run_step(bench: Bench, shape: Shape, tokens: int, sparsity: float, mode: str) -> Values:
    """The whole model; in mode "dynamic_threshold" the dense time is that of the static row, where there is one."""
    frames, height, width = bench.shapes[tokens][0]
    model = _on_device(bench, lambda: VideoTransformer(shape))
    latents = torch.randn(1, LATENT_CHANNELS, frames, 2 * height, 2 * width, device=bench.device, dtype=bench.dtype)
    text = torch.randn(1, shape.text_tokens, shape.text_dim, device=bench.device, dtype=bench.dtype)
    inputs = (latents, torch.full((1,), 500.0, device=bench.device), text)
    known = bench.found(f"step/{tokens}/static") if mode == "dynamic_threshold" else None
    return _both(bench, model, inputs, shape, tokens, {"sparsity": sparsity, "mode": mode}, shape.layers, known)


def _on_device(bench: Bench, build: Any) -> torch.nn.Module:
    """A model in eval mode, made on the device."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        return build().to(bench.dtype).eval().requires_grad_(False)


def _both(
    bench: Bench, model: torch.nn.Module, inputs: tuple[Any, ...], shape: Shape, tokens: int,
    options: dict[str, Any], sites: int, known: Values | None = None,
) -> Values:  # fmt: skip
    """Times of both sides, compile times, memory; `known`: a row that has the dense side already."""
    options = {**options, "min_tokens": 0, "inner": bench.backend}
    dense_row = bench.found(f"dense/{tokens}/{shape.head_dim}")
    best = dense_row["best"] if dense_row and bench.device != "cpu" else None
    clock = replace(bench.clock, budget_ms=1500.0, min_repeats=2 if bench.reduced else 3)
    values: Values = {"ideal": None, "best_dense": best}
    torch._dynamo.reset()
    with torch.no_grad():
        if known is None:
            with sdpa_kernel(BACKENDS[best]) if best else contextlib.nullcontext():
                dense = torch.compile(model, backend=bench.backend, dynamic=False)
                values["dense_compile_s"] = _seconds(lambda: dense(*inputs))
                values["dense_ms"] = clock.time(lambda: dense(*inputs)).ms
                values["dense_memory_bytes"] = peak_memory(lambda: dense(*inputs), bench.device)
            torch._dynamo.reset()
        else:
            values |= {name: known[name] for name in ("dense_ms", "dense_memory_bytes")}
        # The function itself: its name is known only where the package is installed.
        sparse = torch.compile(model, backend=dynamicrad, options=options, dynamic=False)
        values["compile_s"] = _seconds(lambda: sparse(*inputs))
        report = drad.report(sparse)
        if len(report.replaced) != sites:
            raise AssertionError(f"{len(report.replaced)} of {sites} attentions were replaced: {report.summary()}")
        timing = clock.time(lambda: sparse(*inputs))
        values["memory_bytes"] = peak_memory(lambda: sparse(*inputs), bench.device)
    sparsity = sum(site.sparsity for site in report.replaced) / sites
    share = shape.attention_share(tokens)
    values |= {
        "ms": timing.ms, "spread": timing.spread, "repeats": timing.repeats, "sparsity": sparsity,
        "attention_flops_share": share, "gain": values["dense_ms"] / timing.ms,
        "ideal": 1.0 / (1.0 - share * sparsity), "passes_s": report.seconds["passes"],
    }  # fmt: skip
    return {**values, "of_ideal": values["gain"] / values["ideal"]}


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start
