"""Time of a whole search (`search_blocks`) on the CPU, beside dense attention (PyTorch's SDPA).

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2 python benchmarks/search_time.py

Times are the best of --repeats rounds in which the paths take turns, so that a busy machine slows all of them alike;
--clock cpu counts the CPU time of the process divided by its threads instead of wall time. With OMP_WAIT_POLICY=passive
the threads of dense attention stop at once when it is done; else they spin for some ms beside the search's first ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from select_time import best

from dynamicrad_compile.bench.clock import processor
from dynamicrad_compile.kernels import search_op as _registers_the_ops  # noqa: F401

OPS = torch.ops.dynamicrad


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--block", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    given = parser.parse_args()
    threads = torch.get_num_threads()
    clock = time.perf_counter if given.clock == "wall" else lambda: time.process_time() / threads
    torch.manual_seed(0)
    print(f"{processor()}, {threads} threads, {given.clock} time, PyTorch {torch.__version__}; {given.heads} heads, "
          f"float32, best of {given.repeats}\n")  # fmt: skip
    print("| tokens | head_dim | block | dense ms | search ms | share | products alone | exponentials alone |")
    print("|-|-|-|-|-|-|-|-|")
    for tokens in given.tokens:
        for dim in given.head_dim:
            q, k, v = torch.randn(3, 1, given.heads, tokens, dim)
            for block in given.block:
                ms = best(paths(q, k, v, block), given.repeats, clock)
                shares = [f"{ms[path] / ms['dense']:.1%}" for path in ("search", "products", "exponentials")]
                row = [tokens, dim, block, f"{ms['dense']:.0f}", f"{ms['search']:.0f}", *shares]
                print(f"| {' | '.join(map(str, row))} |", flush=True)


def paths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> dict[str, Callable[[], Any]]:
    """Dense attention, a whole search of as many queries and keys, and the two parts of it that nothing can spare.

    The parts run in chunks of 2 MiB of scores that stay in the cache, each operator on all threads.
    """
    lse = torch.logsumexp(q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5, -1).expand(q.shape[:3]).contiguous()
    rows = -(-q.shape[2] // block)
    own = torch.arange(rows, dtype=torch.int32)[None, None, :, None]
    counts = torch.ones(1, 1, rows, dtype=torch.int32)
    given, scores = torch.randn(2, 2048, 256)

    def chunks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, y in zip(q[0], k[0], strict=True):
            for queries in x.split(len(scores)):
                yield from ((queries, keys) for keys in y.split(scores.shape[1]))

    def products() -> None:
        for queries, keys in chunks():
            torch.mm(queries, keys.t(), out=scores)

    def exponentials() -> None:
        for _ in chunks():
            torch.exp2(given, out=scores)

    return {
        "products": products,
        "exponentials": exponentials,
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "search": lambda: OPS.search_blocks(q, k, lse, counts, own, 0.8, 1.0, None, block, block),
    }


if __name__ == "__main__":
    main()
