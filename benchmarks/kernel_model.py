"""What the forward kernel should reach by arithmetic alone: tiles by what they need, row orders by simulation.

    python benchmarks/kernel_model.py tiles --arch 90            # every admissible tile, compiled ahead of time
    python benchmarks/kernel_model.py schedule                   # natural order against heavy rows first

Needs no GPU and measures nothing. Per multiprocessor and clock a tile of m queries and n keys costs
4 m n head_dim / tensor FLOPs on the tensor cores, m n / 16 on the special function units (exp2), 6 m n / 128 on the
others (scale, maximum, sum, conversion), and reads 4 n head_dim bytes from the L2 cache. `serial` adds the first three,
as one block of a multiprocessor does without warp specialisation; `overlap` takes the largest, as many independent ones
do at best. Both are at least the time of the reads. What a measurement gives lies between.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from dataclasses import dataclass

import dynamicrad_compile as drad
from dynamicrad_compile.kernels.tiles import SHARED_MEMORY, Tile, choose_tile


@dataclass(frozen=True)
class Chip:
    """Rates of one multiprocessor, per clock; from the vendor's white papers, the L2 rate from public measurements."""

    name: str
    units: int
    clock: float  # GHz, boost under load
    tensor: int  # dense bf16 FLOPs with fp32 sums
    l2: float  # bytes


CHIPS = {
    80: Chip("A100", 108, 1.41, 2048, 30.0),
    89: Chip("L40S", 142, 2.30, 1024, 16.0),
    90: Chip("H100 / H200", 132, 1.75, 4096, 24.0),
    120: Chip("RTX 5090", 170, 2.40, 1024, 16.0),
}
SPECIAL, PLAIN, PLAIN_OPERATIONS = 16, 128, 6
REGISTERS, THREADS = 65536, 2048


@dataclass(frozen=True)
class Estimate:
    blocks: int  # that share a multiprocessor
    serial: float  # TFLOP/s
    overlap: float
    bound: str


def estimate(chip: Chip, tile: Tile, head_dim: int, registers: int, shared: int, limit: int) -> Estimate:
    """Occupancy and the two bounds of a tile that needs `registers` a thread and `shared` bytes of `limit`."""
    threads = 32 * tile.num_warps
    blocks = min(REGISTERS // (threads * -(-registers // 8) * 8), (limit + 1024) // (shared + 1024), THREADS // threads)
    scores = tile.block_m * tile.block_n
    costs = {
        "tensor cores": 4 * scores * head_dim / chip.tensor,
        "exp2": scores / SPECIAL,
        "other arithmetic": PLAIN_OPERATIONS * scores / PLAIN,
    }
    reads = 4 * tile.block_n * head_dim / chip.l2
    peak = 4 * scores * head_dim * chip.units * chip.clock * 1e-3
    slowest = max(costs, key=lambda name: costs[name])
    bound = "L2 reads" if reads > costs[slowest] else slowest
    return Estimate(blocks, peak / max(sum(costs.values()), reads), peak / max(*costs.values(), reads), bound)


def tiles(arch: int, head_dims: list[int]) -> None:
    """Compile every tile of a small grid and print those that fit and do not spill."""
    from dynamicrad_compile.kernels.ahead_of_time import build_forward

    chip = CHIPS[arch]
    print(f"\nsm_{arch} ({chip.name}), bf16, blocks of 128, without masks; TFLOP/s on active blocks by arithmetic\n")
    print("| head_dim | tile | warps | stages | kernel | registers | shared | blocks | serial | overlap | bound | |")
    print("|---:|---|---:|---:|---|---:|---:|---:|---:|---:|---|---|")
    for dim in head_dims:
        chosen = choose_tile(divmod(arch, 10), True, dim, 128, 128)
        grid = itertools.product(
            (64, 128), (32, 64, 128), (4, 8), (2, 3), ("triton", "tma") if arch >= 90 else ("triton",)
        )
        for tile in (Tile(*sizes) for sizes in grid):
            if tile.block_m == 64 and tile.num_warps == 8:
                continue
            built = build_forward(arch, "bf16", dim, tile)
            if built.spilled or built.shared > SHARED_MEMORY[arch]:
                continue
            e = estimate(chip, tile, dim, built.registers, built.shared, SHARED_MEMORY[arch])
            same = (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, tile.kernel)
            mine = same == (chosen.block_m, chosen.block_n, chosen.num_warps, chosen.num_stages, chosen.kernel)
            print(
                f"| {dim} | {tile.block_m} x {tile.block_n} | {tile.num_warps} | {tile.num_stages} | "
                f"{tile.kernel} | {built.registers} | {built.shared >> 10} KiB | {e.blocks} | "
                f"{e.serial:.0f} | {e.overlap:.0f} | {e.bound} | {'in use' if mine else ''} |",
                flush=True,
            )


CLIPS = {  # name: grid, text tokens, heads
    "Wan 1.3B, 480p": ((21, 30, 52), 0, 12),
    "Wan 14B, 720p": ((21, 45, 80), 0, 40),
    "HunyuanVideo, 480p": ((21, 30, 52), 256, 24),
    "HunyuanVideo, 720p": ((33, 45, 80), 256, 24),
    "CogVideoX 5B": ((13, 30, 45), 226, 48),
    "short clip with text": ((13, 20, 32), 128, 12),
}


def makespan(rows: list[float], units: int) -> float:
    """Time until the last of `units` has worked off the rows, each taken by whoever is free first."""
    busy = [0.0] * units
    for row in rows:
        heapq.heappush(busy, heapq.heappop(busy) + row)
    return max(busy)


def schedule(units: int) -> None:
    """Share of the multiprocessors' time that is used, with one program on each."""
    print(f"\n80 % sparsity, blocks of 128, {units} multiprocessors; share of their time that is used\n")
    print("| clip | rows | heavy | waves | natural order | heavy rows first |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (grid, text, heads) in CLIPS.items():
        plan = drad.make_plan("dynamicrad", grid=grid, block_size=128, text_after=text, sparsity=0.8)
        counts = [c + 2.0 for c in plan.kv_counts[0, 0].tolist()]  # 2: start and end of a program
        mean = sum(counts) / len(counts)
        heavy, light = [c for c in counts if c > 2 * mean], [c for c in counts if c <= 2 * mean]
        ideal = sum(counts) * heads / units
        natural, ordered = makespan(counts * heads, units), makespan(heavy * heads + light * heads, units)
        waves = len(counts) * heads / units
        shares = f"{ideal / natural:.0%} | {ideal / ordered:.0%}"
        print(f"| {name} | {len(counts)} | {len(heavy)} | {waves:.0f} | {shares} |")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tiles", "schedule"))
    parser.add_argument("--arch", type=int, choices=sorted(CHIPS), default=90)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    args = parser.parse_args(argv)
    if args.what == "tiles":
        tiles(args.arch, args.head_dims)
    else:
        schedule(CHIPS[args.arch].units)


if __name__ == "__main__":
    main()
