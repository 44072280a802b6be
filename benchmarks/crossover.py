"""Rewrite the crossover table: from how many tokens on block-sparse attention is faster than dense.

    python benchmarks/crossover.py measure                          # this machine; prints, writes nothing
    python benchmarks/crossover.py measure --write                  # and puts it into the package's table
    python benchmarks/crossover.py suite benchmarks/results/X.json --write    # from a run of gpu_suite.py
    python benchmarks/crossover.py estimate --write                 # GPUs that nobody has measured, from a cost model

The table is dynamicrad_compile/plans/crossover.toml; `min_tokens="auto"` reads it. A measured table takes the place of
an estimated one for the same architecture and dtype, never the other way round. The file is checked before each write.

Measured in turns: each round times dense, every sparse plan, dense again; a ratio is the dense time, averaged over
before and after, over the sparse time of the same round, and its median over the rounds counts. So a busy machine slows
both sides alike. Plans are those of pattern "dynamicrad" with compensation, as the shipped profiles have it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from suite import machine
from suite.estimate import estimated_tables

import dynamicrad_compile as drad
from dynamicrad_compile.plans import crossover

GRIDS = {
    512: (4, 8, 16),
    1024: (4, 16, 16),
    2048: (8, 16, 16),
    4096: (8, 16, 32),
    8320: (13, 20, 32),
    16380: (13, 30, 42),
    32760: (21, 30, 52),
}
SPARSITIES = (0.3, 0.5, 0.8, 0.9)
DTYPES = {"float": torch.float32, "half": torch.bfloat16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of one of the three sources."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--write", action="store_true", help="put the tables into --output")
    shared.add_argument("--output", type=Path, default=crossover.TABLE, help="the table (the package's own)")
    sources = parser.add_subparsers(dest="source", required=True)
    measure = sources.add_parser("measure", parents=[shared], help="time this machine's CPU or GPU")
    measure.add_argument("--device", default="cpu")
    measure.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8320], choices=GRIDS)
    measure.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    measure.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    measure.add_argument("--heads", type=int, default=4)
    measure.add_argument("--dtypes", nargs="+", default=["float", "half"], choices=DTYPES)
    measure.add_argument("--rounds", type=int, default=7)
    measure.add_argument("--threads", type=int, help="threads of PyTorch (all cores)")
    measure.add_argument("--note", default="", help="about the machine, such as 'busy'")
    suite = sources.add_parser("suite", parents=[shared], help="from the JSON of gpu_suite.py")
    suite.add_argument("file", type=Path)
    sources.add_parser("estimate", parents=[shared], help="from the cost model")
    return parser.parse_args(argv)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's work included."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def ratios(dense: Callable[[], Any], sparse: list[Callable[[], Any]], rounds: int, device: str) -> list[float]:
    """Dense over sparse time of each call in `sparse`: medians over paired rounds."""
    for call in (dense, *sparse):
        call()
    found: list[list[float]] = [[] for _ in sparse]
    before = milliseconds(dense, device)
    for _ in range(rounds):
        times = [milliseconds(call, device) for call in sparse]
        after = milliseconds(dense, device)
        for ratio, own in zip(found, times, strict=True):
            ratio.append((before + after) / 2 / own)
        before = after
    return [statistics.median(several) for several in found]


def measure(args: argparse.Namespace) -> list[crossover.Table]:
    """Tables of this machine, one for each dtype."""
    if args.threads:
        torch.set_num_threads(args.threads)
    arch = crossover.architecture(torch.device(args.device))
    if arch is None:
        sys.exit(f"no architecture is known for device {args.device!r}; use cpu or cuda")
    about = machine.describe(args.device)
    where = ", ".join(filter(None, (machine.short(about), args.note)))
    tables = []
    for name in args.dtypes:
        rows = []
        for tokens in sorted(args.tokens):
            plans = {}
            for s in args.sparsities:
                plan = drad.make_plan("dynamicrad", GRIDS[tokens], sparsity=s, compensate=1.0).to(args.device)
                plans[round(plan.sparsity, 3)] = plan  # few blocks: several wishes may give one plan
            for dim in args.head_dims:
                torch.manual_seed(0)
                q, k, v = torch.randn(3, 1, args.heads, tokens, dim, device=args.device).to(DTYPES[name])
                calls = [lambda p=p, q=q, k=k, v=v: drad.block_sparse_attention(q, k, v, p) for p in plans.values()]
                dense = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
                found = ratios(dense, calls, args.rounds, args.device)
                for sparsity, ratio in zip(plans, found, strict=True):
                    rows.append(crossover.Row(tokens, dim, sparsity, round(ratio, 3)))
                shown = ", ".join(f"{s:.0%} {ratio:.2f}x" for s, ratio in zip(plans, found, strict=True))
                print(f"{name}, {tokens} tokens, head_dim {dim}: {shown}", flush=True)
        tables.append(crossover.Table(
            arch=arch, dtype=name, source="measured", machine=where, date=datetime.date.today(),
            versions=machine.versions(about), command=_command(args), rows=tuple(rows),
        ))  # fmt: skip
    return tables


def _command(args: argparse.Namespace) -> str:
    given = f"--tokens {' '.join(map(str, args.tokens))} --sparsities {' '.join(map(str, args.sparsities))} "
    given += f"--head-dims {' '.join(map(str, args.head_dims))} --heads {args.heads} --rounds {args.rounds}"
    return f"python benchmarks/crossover.py measure --device {args.device} {given}"


def from_suite(path: Path) -> list[crossover.Table]:
    """The table of a suite's JSON: best dense backend over the sparse op, forward rows that succeeded."""
    content = json.loads(path.read_text(encoding="utf-8"))
    about, rows = content["about"], []
    for row in content["rows"]:
        if row["group"] == "forward" and row["status"] == "ok" and row.get("best_dense_ms"):
            ratio = row["best_dense_ms"] / row["ms"]
            rows.append(crossover.Row(row["tokens"], row["head_dim"], row["sparsity"], round(ratio, 3)))
    rows = [row for row in rows if row.sparsity > 0.05]  # sparsity 0 is no plan that anybody runs
    if not rows:
        sys.exit(f"{path} has no forward rows with a dense time beside them")
    return [crossover.Table(
        arch=about["arch"], dtype=about["dtype_class"], source="measured", machine=machine.short(about),
        date=datetime.date.fromisoformat(about["date"]), versions=machine.versions(about),
        command=content["command"], rows=tuple(sorted(rows)),
    )]  # fmt: skip


def merged(old: list[crossover.Table], new: list[crossover.Table]) -> list[crossover.Table]:
    """Old tables with the new ones in their places; an estimate never takes the place of a measurement."""
    tables = {(t.arch, t.dtype): t for t in old}
    for table in new:
        there = tables.get((table.arch, table.dtype))
        if there is not None and there.source == "measured" and table.source == "estimated":
            print(f"{table.arch} {table.dtype}: kept what was measured on {there.date}")
            continue
        tables[table.arch, table.dtype] = table
    return sorted(tables.values(), key=lambda t: (t.arch, t.dtype))


def main(argv: list[str] | None = None) -> list[crossover.Table]:
    """Make the tables, print where each architecture crosses over, write them if asked."""
    args = parse(argv)
    if args.source == "measure":
        new = measure(args)
    elif args.source == "suite":
        new = from_suite(args.file)
    else:
        new = estimated_tables()
    for table in new:
        print(f"\n{table.arch}, {table.dtype}, {table.source}: {table.machine}")
        for dim in sorted({row.head_dim for row in table.rows}):
            for sparsity in (0.5, 0.8, 0.9):
                first = crossover.first_length([table], table.arch, sparsity, dim, table.dtype == "half")
                print(f"  head_dim {dim}, sparsity {sparsity:.0%}: pays from {first or '-'} tokens on")
    if args.write:
        old = crossover.load(args.output) if args.output.is_file() else []
        crossover.save(merged(list(old), new), args.output)
        print(f"\nwrote {args.output}")
    return new


if __name__ == "__main__":
    main()
