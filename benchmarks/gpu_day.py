"""The first thing to run on a GPU: build every form of the kernels, check it, time it, propose tiles; see gpu_day.sh.

    python benchmarks/gpu_day.py                                   # at most 450 s on one GPU
    python benchmarks/gpu_day.py --only build --arch 90 --device cpu   # the builds, without a GPU
    python benchmarks/gpu_day.py --device cpu --reduced            # the plumbing, without a GPU

Rows run in processes of their own (`suite/apart.py`), in the order of `suite/day.py`. NAME.json is written after every
row, NAME.md and a short table at the end; `autotune_tiles.py NAME.json` writes the tiles that won.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

NEEDED = "torch>=2.11, triton>=3.6, numpy, pydantic>=2.7 with pydantic-core, annotated-types and typing-inspection"
try:
    import torch
    from suite import day, day_table, machine, tables, tile_rows
    from suite.apart import Batch, run_apart
    from suite.bars import bar
    from suite.day import Day
    from suite.runner import SCHEMA, Journal, Row, Values

    from dynamicrad_compile.kernels.tiles import CHOICE
except ImportError as error:
    sys.exit(f"{error}\nIt needs {NEEDED}; gpu_day.sh says which wheels to bring along.")

RESULTS = Path(__file__).parent / "results"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--reduced", action="store_true", help="tiny shapes, no code generation: the plumbing")
    parser.add_argument("--arch", type=int, help="of the builds (that of the device; 90 without one)")
    parser.add_argument("--dtype", choices=day.DTYPES, help="of what is timed (bf16; fp32 on the CPU)")
    parser.add_argument("--budget", type=float, default=430.0, help="seconds for everything (430)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only rows whose name begins with one of these")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--layers", type=int, default=2, help="of the whole step (2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--name", help="of the result files (made of chip and date)")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="go on with this run")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; for the plumbing: --device cpu --reduced")
    if args.device == "cpu" and not args.reduced and args.only != ["build"]:
        parser.error("on the CPU it runs --reduced, or --only build")
    if args.resume and not args.resume.is_file():
        parser.error(f"--resume {args.resume}: there is no such file")
    if os.environ.get(CHOICE):
        parser.error(f"{CHOICE} is set, but the run compares all forms: unset it")
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    return args


def start(args: argparse.Namespace) -> Journal:
    """The journal of a new run, or of the one to go on with."""
    about = machine.describe(args.device)
    about |= {"dtype": args.dtype, "dtype_class": "float" if args.dtype == "fp32" else "half"}
    if args.resume:
        try:
            journal = Journal.resume(args.resume)
        except ValueError as error:
            sys.exit(f"--resume: {error}")
        for fact in ("chip", "dtype", "torch"):
            if (there := journal.content["about"][fact]) != about[fact]:
                sys.exit(f"--resume {args.resume}: that run had {fact} {there}, this one has {about[fact]}")
        return journal
    name = args.name or machine.file_name("gpu_day", about, ["reduced"] * args.reduced)
    command = f"python benchmarks/gpu_day.py --device {args.device} --dtype {args.dtype} --budget {args.budget:g}"
    command += " --reduced" * args.reduced + (f" --only {' '.join(args.only)}" if args.only else "")
    content = {"schema": SCHEMA, "name": name, "command": command, "about": about, "rows": []}
    return Journal(args.output / f"{name}.json", {**content, "reduced": args.reduced})


def chosen(stage: day.Stage, about: Day, content: Values, only: tuple[str, ...]) -> list[list[Row]]:
    """Groups of the stage's rows whose names begin with one of `only`."""
    groups = [[row for row in group if row.name.startswith(only)] for group in day.groups_of(stage, about, content)]
    return [group for group in groups if group]


def run_stage(
    stage: day.Stage, groups: list[list[Row]], about: Day, journal: Journal, deadline: float, end: float
) -> None:
    """Start rows of a stage until its deadline, then bring up to date what the next ones read from the journal."""
    jobs, left = day.jobs_of(stage), deadline - time.monotonic()
    print(f"[{stage.name}] {sum(map(len, groups))} rows, {left:.0f} s", file=sys.stderr, flush=True)
    settings = replace(about, clock_ms=stage.clock_ms, settled=stage.settled, threads=1 if jobs > 1 else 0)
    step_dim = about.dims[0]
    batch = Batch(groups, day.make, settings, deadline, end, jobs, stage.limit,
                  method=journal.content.get("method", "forkserver"),
                  bar=lambda row: bar(row, journal.content, step_dim))  # fmt: skip
    run_apart(batch, journal)
    if stage is day.STAGES[0] and any(row["status"] == "failed" for row in journal.rows):
        print("  again, in a process that is no fork", file=sys.stderr, flush=True)
        journal.content["rows"], journal.content["method"] = [], "spawn"
        run_apart(replace(batch, method="spawn"), journal)
    for row in journal.rows:
        if row["group"] == "machine" and row["status"] == "ok":
            journal.content["ceilings"] = {k: row[k] for k in ("matmul_tflops", "copy_tbs", "launch_us", "ceilings")}
    if proposal := tile_rows.proposal(journal.rows):
        journal.content["tile_proposal"] = proposal
    if proposal := tile_rows.backward_proposal(journal.rows):
        journal.content["backward_proposal"] = proposal
    journal.write()


def main(argv: list[str] | None = None) -> Values:
    """Run the day; returns the content of its JSON."""
    began = time.monotonic()
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; the rows so far are in the journal"))
    journal = start(args)
    content = journal.content
    arch = args.arch or (90 if args.device == "cpu" else int(content["about"]["arch"].removeprefix("sm_")))
    about = Day(args.device, args.reduced, not args.reduced, args.dtype, arch, args.sparsity, args.layers)
    print(f"{machine.short(content['about'])}; {machine.versions(content['about'])}", file=sys.stderr, flush=True)
    wanted = [(stage, chosen(stage, about, content, tuple(args.only or ("",)))) for stage in day.STAGES]
    wanted = [(stage, groups) for stage, groups in wanted if groups]
    if not wanted:
        sys.exit(f"no row begins with {' or '.join(args.only)}; day.py has their names")
    total, share = sum(stage.share for stage, _ in wanted) or 1.0, 0.0
    try:
        for stage, groups in wanted:
            share += stage.share
            part = 1.0 if stage is wanted[-1][0] else share / total
            run_stage(stage, groups, about, journal, began + args.budget * part, began + args.budget)
    finally:
        page = journal.path.with_suffix(".md")
        page.write_text(tables.page(content), encoding="utf-8")
        print(day_table.short(content, about.main, about.long, about.dims, about.sparsity), flush=True)
        print(f"wrote {journal.path} and {page.name}, {time.monotonic() - began:.0f} s")
    return content


if __name__ == "__main__":
    result = main()
    sys.exit(1 if any(row["status"] == "failed" for row in result["rows"]) else 0)
