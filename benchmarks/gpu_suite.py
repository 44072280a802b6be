"""Everything that has to be shown on a GPU, in one command: correct first, then fast, then a page of figures.

    python benchmarks/gpu_suite.py                          # about 8 minutes on one GPU
    python benchmarks/gpu_suite.py --only correct forward   # rows whose name begins with one of these
    python benchmarks/gpu_suite.py --tiles                  # every admissible tile of the forward kernel instead
    python benchmarks/gpu_suite.py --device cpu --reduced   # the plumbing, in less than a minute

Needs torch, triton and this package. Rows run in order of importance until the budget is spent; what is left out, fails
or is not supported becomes a line with its reason. NAME.json is written after every row and NAME.md at the end, in
benchmarks/results (--output); --resume NAME.json goes on with a run that was cut off. Every row says which part of the
chip bounds it. A ratio is always of two figures of the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

try:
    import torch
    from suite import attention, correctness, graphs, machine, overheads, steps, tables, tile_rows
    from suite.bench import Bench
    from suite.roofline import Ceilings, measure_ceilings
    from suite.runner import SCHEMA, Journal, Row, run_rows
    from suite.timing import Clock
except ImportError as error:
    sys.exit(f"{error}. Install what the package needs: pip install -e . (torch, triton, numpy, pydantic)")

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; what is left out depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument(
        "--reduced", action="store_true", help="tiny shapes, no code generation: for tests of the suite"
    )
    parser.add_argument("--inductor", action="store_true", help="with --reduced: generate code all the same")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is timed (bf16; fp32 on the CPU)")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for all rows (450)")
    parser.add_argument("--row-limit", type=float, default=150.0, help="seconds for one row (150)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only rows whose name begins with one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--tiles", action="store_true", help="time tiles of the forward kernel, print a proposal")
    parser.add_argument("--sparsity", type=float, default=0.8, help="of steps, overheads and tiles (0.8)")
    parser.add_argument("--layers", type=int, default=2, help="of the whole step (2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--name", help="of the result files (made of chip and date)")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="go on with this run")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; for the plumbing: --device cpu --reduced")
    if args.device == "cpu" and not args.reduced:
        parser.error("on the CPU the suite runs --reduced only; for CPU figures see cpu_attention.py and cpu_step.py")
    if args.resume and not args.resume.is_file():
        parser.error(f"--resume {args.resume}: there is no such file")
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    return args


def all_rows(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Every row, the most important first."""
    shapes = sorted(bench.shapes)
    s = args.sparsity
    if args.tiles:
        major, minor = (9, 0) if bench.device == "cpu" else torch.cuda.get_device_capability()
        for dim in (128, 64):
            for tokens in shapes[:1] if bench.reduced else (32760,):
                yield from tile_rows.rows(bench, tokens, dim, s, tile_rows.every_tile(10 * major + minor, dim))
        return
    yield from correctness.rows(bench.device, bench.reduced)
    if bench.reduced:
        main, dims, sparsities, steps_at = shapes[0], (32,), (0.0, s), shapes[0]
        tables_at, short = shapes, []
    else:
        main, dims, sparsities, steps_at = 32760, (128, 64), (0.8, 0.9, 0.5, 0.0), 32760
        tables_at, short = [32760, 69120, 142080, 8320], [n for n in shapes if n < 8320]
    # The headline: one length, the first head_dim, everything about it.
    dim = dims[0]
    yield from _shape(bench, main, dim, sparsities)
    yield from attention.flex_rows(bench, main, dim, (s,))
    yield attention.backward_row(bench, main, dim, s)
    yield from graphs.rows(bench, main, dim)
    yield from overheads.rows(bench, main, dim, s)
    step_rows = list(steps.rows(bench, steps_at, s, args.layers))
    if not bench.reduced:
        yield attention.dense_row(bench, steps_at, 128)  # the step's dense side takes the fastest backend of it
    yield from step_rows[:2]
    # The table.
    for dim in dims:
        for tokens in tables_at:
            yield from _shape(bench, tokens, dim, sparsities)
    for tokens in tables_at[1:2]:
        yield from overheads.rows(bench, tokens, dims[0], s)
    for dim in dims[1:]:
        yield attention.backward_row(bench, main, dim, s)
    for tokens in tables_at[1:2]:
        yield attention.backward_row(bench, tokens, dims[0], s)
    for tokens in short:  # for the crossover table
        for dim in dims:
            yield from _shape(bench, tokens, dim, (0.8, 0.5))
    for dim in dims:
        for tokens in tables_at:
            yield from attention.flex_rows(bench, tokens, dim, sparsities)
    yield from step_rows[2:]


def _shape(bench: Bench, tokens: int, dim: int, sparsities: tuple[float, ...]) -> Iterator[Row]:
    yield attention.dense_row(bench, tokens, dim)
    for sparsity in sparsities:
        yield attention.forward_row(bench, tokens, dim, sparsity)


def main(argv: list[str] | None = None) -> dict:
    """Run the suite; returns the content of its JSON."""
    args = parse(argv)
    deadline = time.monotonic() + args.budget
    about = machine.describe(args.device)
    about |= {"dtype": args.dtype, "dtype_class": "float" if args.dtype == "fp32" else "half"}
    clock = Clock(args.device, budget_ms=20.0 if args.reduced else 250.0, min_repeats=3 if args.reduced else 5)
    if args.resume:
        journal = _resumed(args.resume, about)
    else:
        kinds = [kind for kind in ("tiles", "reduced") if getattr(args, kind)]
        name = args.name or machine.file_name("gpu_suite", about, kinds)
        content = {"schema": SCHEMA, "name": name, "command": _command(args), "about": about, "rows": []}
        content["reduced"] = args.reduced
        journal = Journal(args.output / f"{name}.json", content)
    codegen = args.inductor or not args.reduced
    bench = Bench(args.device, args.reduced, codegen, DTYPES[args.dtype], clock, journal, Ceilings(0, 0, 0, 0, 0))
    rows = list({row.name: row for row in all_rows(bench, args)}.values())
    if args.reduced:
        rows = [replace(row, seconds=0.1 * row.seconds) for row in rows]
    if args.only:
        rows = [row for row in rows if row.name.startswith(tuple(args.only))]
        if not rows:
            sys.exit(f"no row begins with {' or '.join(args.only)}; --list shows their names")
    if args.list:
        print("\n".join(row.name for row in rows))
        return journal.content
    if "ceilings" not in journal.content:
        bench.ceilings, journal.content["ceilings"] = measure_ceilings(args.device, clock, args.reduced)
    bench.ceilings = Ceilings(**journal.content["ceilings"]["ceilings"])
    print(f"{machine.short(about)}; {machine.versions(about)}; {len(rows)} rows", file=sys.stderr, flush=True)
    run_rows(rows, journal, deadline, args.row_limit, args.device)
    if args.tiles:
        journal.content["tile_proposal"] = tile_rows.proposal(journal.rows)
    order = {row.name: i for i, row in enumerate(rows)}
    journal.content["rows"].sort(key=lambda row: order.get(row["name"], -1))
    journal.write()
    page = journal.path.with_suffix(".md")
    page.write_text(tables.page(journal.content), encoding="utf-8")
    print(tables.short(journal.content))
    print(f"\nwrote {journal.path} and {page.name}")
    return journal.content


def _resumed(path: Path, about: dict) -> Journal:
    """The journal to go on with; figures of two machines or dtypes don't belong in one."""
    try:
        journal = Journal.resume(path)
    except ValueError as error:
        sys.exit(f"--resume: {error}")
    for fact in ("chip", "dtype", "torch"):
        there = journal.content["about"][fact]
        if there != about[fact]:
            sys.exit(f"--resume {path}: that run had {fact} {there}, this one has {about[fact]}; start a new one")
    return journal


def _command(args: argparse.Namespace) -> str:
    """The command as others would type it: without files of this machine."""
    flags = [f"--{name}" for name in ("reduced", "inductor", "tiles") if getattr(args, name)]
    numbers = [f"--{name} {getattr(args, name):g}" for name in ("budget", "sparsity", "layers")]
    only = [f"--only {' '.join(args.only)}"] if args.only else []
    device = f"--device {args.device} --dtype {args.dtype}"
    return " ".join(["python benchmarks/gpu_suite.py", device, *flags, *numbers, *only])


if __name__ == "__main__":
    content = main()
    sys.exit(1 if any(row["status"] == "failed" for row in content["rows"]) else 0)
