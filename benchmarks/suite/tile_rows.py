"""Times of tiles of the forward kernel for a dtype and head_dim, and a proposal for the tile table.

A tile is admissible if it divides the plan's blocks and the chip accepts it; one that needs too many registers or too
much shared memory is a line that says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from dynamicrad_compile.kernels.attention_arguments import Attention
from dynamicrad_compile.kernels.tiles import Tile

from . import variants
from .attention import SAMPLE_BOUND, sample_error
from .bench import Bench, active_pairs
from .runner import Row, Values

BLOCK_M, BLOCK_N, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
FIELDS = ("block_m", "block_n", "num_warps", "num_stages", "kernel")


def every_tile(arch: int, dim: int) -> list[Tile]:
    """All admissible tiles of the plain kernel; on sm_90 also of the copy engine's, and candidates of the others."""
    others = [tile for tile in variants.candidates(arch, dim) if tile.kernel not in ("triton", "tma")]
    kernels = ("triton", "tma") if arch // 10 == 9 else ("triton",)
    return [Tile(*sizes) for sizes in itertools.product(BLOCK_M, BLOCK_N, WARPS, STAGES, kernels)] + others


def facts_of(tile: Tile) -> Values:
    """The tile as fields of a row."""
    return {name: getattr(tile, name) for name in FIELDS}


def name_of(tile: Tile) -> str:
    """The tile as part of a row's name."""
    return "{kernel}/{block_m}x{block_n}/{num_warps}/{num_stages}".format(**facts_of(tile))


def rows(bench: Bench, tokens: int, dim: int, sparsity: float, tiles: Iterable[Tile]) -> Iterator[Row]:
    """One row for each tile: its time."""
    for tile in tiles:
        run = lambda t=tile: run_tile(bench, tokens, dim, sparsity, t)  # noqa: E731
        facts = _facts(bench, tokens, dim, sparsity, tile)
        yield Row(f"tile/{tokens}/{dim}/{name_of(tile)}", "tiles", run, 3.0, facts)


def tries(bench: Bench, tokens: int, dim: int, sparsity: float, tiles: Iterable[Tile]) -> Iterator[Row]:
    """One row for each tile: a sample of its output at full size is right. Compiles it for the rows that time it."""
    for tile in tiles:
        run = lambda t=tile: {"error": _prepared(bench, tokens, dim, sparsity, t)[2]}  # noqa: E731
        facts = _facts(bench, tokens, dim, sparsity, tile)
        yield Row(f"try/{tokens}/{dim}/{name_of(tile)}", "tries", run, 6.0, facts)


def _facts(bench: Bench, tokens: int, dim: int, sparsity: float, tile: Tile) -> Values:
    facts = {"tokens": tokens, "head_dim": dim, "dtype": str(bench.dtype)[6:], "wanted_sparsity": sparsity}
    return {**facts, **facts_of(tile)}


def _prepared(bench: Bench, tokens: int, dim: int, sparsity: float, tile: Tile) -> tuple[Attention, Any, float]:
    """Arguments, plan, and the error of a sample of the output, which is within its bound."""
    plan = bench.plan(tokens, sparsity)
    q, k, v = bench.qkv(tokens, dim)
    given = Attention(q, k, v, plan.kv_counts, plan.kv_indices, None, plan.block_q, plan.block_kv)
    error = sample_error(q, k, v, plan, variants.checked_forward(given, tile)[0])
    if not error <= SAMPLE_BOUND[bench.dtype]:
        raise AssertionError(f"error {error:.3g} of a sample of the output")
    return given, plan, error


def run_tile(bench: Bench, tokens: int, dim: int, sparsity: float, tile: Tile) -> Values:
    """Time of the forward with this tile; its result is checked first."""
    given, plan, error = _prepared(bench, tokens, dim, sparsity, tile)
    timing = bench.clock.time(lambda: variants.forward(given, tile))
    flops = 4.0 * active_pairs(plan, bench.shapes[tokens][1]) * dim
    usual = None if bench.device == "cpu" else facts_of(variants.current_tile(bench.dtype, dim))
    return {"ms": timing.ms, "spread": timing.spread, "error": error, "tflops": flops / timing.ms * 1e-9,
            "is_current": usual == facts_of(tile)}  # fmt: skip


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


def backward_proposal(rows_done: list[Values]) -> list[Values]:
    """For each (dtype, head_dim) the fastest form of the backward, and how much faster than plain it is."""
    timed = [row for row in rows_done if row["group"] == "backward" and row["status"] == "ok" and "kernel" in row]
    found = []
    for dtype, dim in sorted({(row["dtype"], row["head_dim"]) for row in timed}):
        times = {row["kernel"]: row["ms"] for row in timed if (row["dtype"], row["head_dim"]) == (dtype, dim)}
        if "triton" in times:
            best = min(times, key=lambda kernel: times[kernel])
            found.append({"dtype": dtype, "head_dim": dim, "kernel": best, "gain": times["triton"] / times[best]})
    return found
