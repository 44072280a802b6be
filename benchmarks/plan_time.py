"""Time and peak memory of building a plan, one fresh process a case.

    OMP_NUM_THREADS=1 python benchmarks/plan_time.py

Each line: the grid, tokens, blocks a side, achieved sparsity, the first and the best time in milliseconds,
the growth of the process's peak memory while the first plan was built, and for comparison the sizes of the
plan and of one byte per block pair.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

CASES = [
    ((1, 1, 1), 128, "one block: the libraries' own memory"),
    ((21, 30, 52), 128, "Wan 480p, 81 frames"),
    ((21, 45, 80), 128, "Wan 720p, 81 frames"),
    ((33, 45, 80), 128, "HunyuanVideo 720p, 129 frames"),
    ((81, 45, 80), 128, "720p, 321 frames"),
    ((21, 45, 80), 64, "Wan 720p, blocks of 64"),
]
HEADER = (
    "| case | pattern | grid | block | tokens | blocks | sparsity "
    "| first ms | best ms | peak MiB | plan MiB | mask MiB |"
)
PATTERNS: dict[str, dict[str, float]] = {"radial": {}, "dynamicrad": {"sparsity": 0.8}}


def measure(pattern: str, grid: tuple[int, int, int], block_size: int, repeats: int) -> dict[str, float]:
    """Build the plan `repeats` times in this process; times in ms, memory in MiB."""
    from dynamicrad_compile.plans.make import make_plan

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        plan = make_plan(pattern, grid, block_size, **PATTERNS[pattern])
        times.append(1e3 * (time.perf_counter() - start))
        if len(times) == 1:
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    plan_bytes = 4 * (plan.kv_counts.numel() + plan.kv_indices.numel())
    return {
        "tokens": plan.q_len,
        "blocks": plan.num_q_blocks,
        "sparsity": plan.sparsity,
        "first_ms": times[0],
        "best_ms": min(times),
        "peak_mib": growth / 1024,
        "plan_mib": plan_bytes / 2**20,
        "mask_mib": plan.num_q_blocks * plan.num_kv_blocks / 2**20,
    }


def main() -> None:
    """Run every case in a child process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        pattern, grid, block_size = json.loads(arguments.case)
        print(json.dumps(measure(pattern, tuple(grid), block_size, arguments.repeats)))
        return
    print(HEADER)
    print("|-" * HEADER.count("| ") + "|")
    for grid, block_size, name in CASES:
        for pattern in PATTERNS:
            case = json.dumps([pattern, grid, block_size])
            command = [sys.executable, __file__, "--case", case, "--repeats", str(arguments.repeats)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            r = json.loads(output.splitlines()[-1])
            print(
                f"| {name} | {pattern} | {'x'.join(map(str, grid))} | {block_size} | {r['tokens']} "
                f"| {r['blocks']} | {r['sparsity']:.4f} | {r['first_ms']:.0f} | {r['best_ms']:.0f} "
                f"| {r['peak_mib']:.1f} | {r['plan_mib']:.1f} | {r['mask_mib']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
