"""Times of every admissible tile of the forward kernel for a dtype and head_dim, and a proposal for the tile table.

A tile is admissible if it divides the plan's blocks and the chip accepts it; one that needs too many registers or too
much shared memory is a line that says so. Fields of a tile that are not varied here are those of the table's own entry.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .attention import SAMPLE_BOUND, sample_error
from .bench import BLOCK, Bench, active_pairs
from .runner import Row, Unsupported, Values

BLOCK_M, BLOCK_N, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
FIELDS = ("block_m", "block_n", "num_warps", "num_stages", "kernel")


def rows(bench: Bench, tokens: int, dim: int, sparsity: float) -> Iterator[Row]:
    """One row for each tile."""
    facts = {"tokens": tokens, "head_dim": dim, "dtype": str(bench.dtype)[6:], "wanted_sparsity": sparsity}
    kernels = (
        ("triton", "tma") if bench.device != "cpu" and torch.cuda.get_device_capability() >= (9, 0) else ("triton",)
    )
    for sizes in itertools.product(BLOCK_M, BLOCK_N, WARPS, STAGES, kernels):
        tile = dict(zip(FIELDS, sizes, strict=True))
        name = "tile/{}/{}/{kernel}/{block_m}x{block_n}/{num_warps}/{num_stages}".format(tokens, dim, **tile)
        run = lambda t=tile: run_tile(bench, tokens, dim, sparsity, t)  # noqa: E731
        yield Row(name, "tiles", run, 3.0, {**facts, **tile})


def run_tile(bench: Bench, tokens: int, dim: int, sparsity: float, sizes: dict[str, Any]) -> Values:
    """Time of the forward with this tile; its result is checked first."""
    if bench.device == "cpu":
        raise Unsupported("tiles are of the CUDA kernel")
    from dynamicrad_compile.kernels.attention_arguments import Attention
    from dynamicrad_compile.kernels.attention_triton import launch_forward
    from dynamicrad_compile.kernels.tiles import choose_tile

    usual = choose_tile(torch.cuda.get_device_capability(), bench.dtype != torch.float32, dim, BLOCK, BLOCK)
    tile = dataclasses.replace(usual, **sizes)
    plan = bench.plan(tokens, sparsity)
    q, k, v = bench.qkv(tokens, dim)

    def call() -> Any:
        given = Attention(q, k, v, plan.kv_counts, plan.kv_indices, None, plan.block_q, plan.block_kv)
        return launch_forward(given, tile=tile)

    error = sample_error(q, k, v, plan, call()[0])
    if not error <= SAMPLE_BOUND[bench.dtype]:
        raise AssertionError(f"error {error:.3g} of a sample of the output")
    timing = bench.clock.time(call)
    flops = 4.0 * active_pairs(plan, bench.shapes[tokens][1]) * dim
    return {"ms": timing.ms, "spread": timing.spread, "error": error, "tflops": flops / timing.ms * 1e-9,
            "is_current": all(getattr(usual, name) == sizes[name] for name in FIELDS)}  # fmt: skip


def proposal(rows_done: list[Values]) -> list[Values]:
    """For each (dtype, head_dim) the tile with the lowest mean of time / best time over the lengths it ran at."""
    tiles = [row for row in rows_done if row["group"] == "tiles" and row["status"] == "ok"]
    found = []
    for dtype, dim in sorted({(row["dtype"], row["head_dim"]) for row in tiles}):
        own = [row for row in tiles if (row["dtype"], row["head_dim"]) == (dtype, dim)]
        best = {n: min(row["ms"] for row in own if row["tokens"] == n) for n in {row["tokens"] for row in own}}
        scores: dict[tuple[Any, ...], list[float]] = {}
        for row in own:
            key = tuple(row[name] for name in FIELDS)
            scores.setdefault(key, []).append(row["ms"] / best[row["tokens"]])
        whole = {key: sum(s) / len(s) for key, s in scores.items() if len(s) == len(best)}
        if not whole:
            continue
        key = min(whole, key=lambda k: whole[k])
        now = [row["ms"] / best[row["tokens"]] for row in own if row["is_current"]]
        found.append({"dtype": dtype, "head_dim": dim, "tile": list(key[:4]), "kernel": key[4], "score": whole[key],
                      "current_score": sum(now) / len(now) if now else None})  # fmt: skip
    return found
