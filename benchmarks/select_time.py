"""Time of `select_blocks` on the CPU, by mass and by error, beside the attention whose blocks it chooses.

    OMP_NUM_THREADS=2 python benchmarks/select_time.py

All blocks of a row are candidates but the first, and "ratio" keeps a fifth of them. Times are the best of --repeats
rounds in which the paths take turns, so that a busy machine slows all of them alike; --clock cpu counts the CPU time of
the process divided by its threads instead of wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from dynamicrad_compile.bench.clock import processor
from dynamicrad_compile.kernels.blocks import cdiv
from dynamicrad_compile.plans.attention import block_sparse_attention
from dynamicrad_compile.plans.plan import BlockPlan, Candidates
from dynamicrad_compile.plans.selection import select_blocks


def candidates_of(tokens: int, block: int) -> Candidates:
    """All blocks but the first (a row of all is dense), in one group."""
    m = cdiv(tokens, block)
    counts = torch.full((1, 1, m), m - 1, dtype=torch.int32)
    indices = torch.arange(1, m, dtype=torch.int32).expand(1, 1, m, -1).contiguous()
    zero = torch.zeros_like(counts)
    return Candidates(BlockPlan(counts, indices, block, block, tokens, tokens), zero, zero)


def best(paths: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each path, after a first call."""
    for call in paths.values():
        call()
    found = dict.fromkeys(paths, float("inf"))
    for _ in range(repeats):
        for name, call in paths.items():
            start = clock()
            call()
            found[name] = min(found[name], 1e3 * (clock() - start))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    given = parser.parse_args()
    threads = torch.get_num_threads()
    clock = time.perf_counter if given.clock == "wall" else lambda: time.process_time() / threads
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, given.heads, given.tokens, given.head_dim)
    print(f"{processor()}, {threads} threads, {given.clock} time, PyTorch {torch.__version__}; {given.tokens} tokens, "
          f"{given.heads} heads of {given.head_dim}, float32, 80 % sparse\n")  # fmt: skip
    print("| block | attention ms | by mass ms | share | by error ms | share |\n|-|-|-|-|-|-|")
    for block in (64, 128):
        candidates = candidates_of(given.tokens, block)
        paths: dict[str, Callable[[], Any]] = {
            rank: lambda rank=rank, c=candidates: select_blocks(q, k, c, (0.2, 0.2), "ratio", rank=rank)
            for rank in ("mass", "error")
        }
        plan = paths["error"]()
        paths["attention"] = lambda plan=plan: block_sparse_attention(q, k, v, plan)
        ms = best(paths, given.repeats, clock)
        shares = [f"{ms[rank]:.0f} | {ms[rank] / ms['attention']:.1%}" for rank in ("mass", "error")]
        print(f"| {block} | {ms['attention']:.0f} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
