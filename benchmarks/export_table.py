"""What can be exported: format x model x mode, each written, loaded in a fresh process, and compared.

    python benchmarks/export_table.py                           # all, about half an hour on one core
    python benchmarks/export_table.py --formats onnx --models wan ltx
    python benchmarks/export_table.py --save                    # also writes benchmarks/results/export.md

Models are those of diffusers, one layer of each kind, tiny widths, random weights, 270 tokens in blocks of 16 (a ragged
tail), with the text that the model has. Compensation is on. Columns

    mode       static: one regime; router: the regime of each row by its prompt, in the graph (the two prompts of the
               check get low and high); dynamic: blocks chosen by queries and keys at each call, router too
    batch      fixed at 2, or open: then 1 and 3 are run as well
    error      of the outputs, |difference| / |expected|, the largest of all runs; expected is the rewritten model in
               eager code. The first run is in a fresh process that imports torch, this package and onnxruntime
    moved      how far sparse attention moved the output from dense, to show that the plan is at work
    size       of all files; export and load in seconds

A case that fails shows its error and does not stop the run. The second table is the attention alone: the function body
of model.onnx against dense attention in standard operators, both in onnxruntime, one process each.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from zoo.exports import FORMATS, MODELS, MODES, Row, cases, run_case

import dynamicrad_compile as drad

RESULTS = Path(__file__).parent / "results"
HEADER = ["format", "model", "mode", "batch", "replaced", "error", "moved", "size", "export s", "load s"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def attention_memory(kind: str, tokens: int) -> dict[str, float]:
    """Seconds and MiB of one attention in onnxruntime, 4 heads of 64, blocks of 128, 80 % skipped."""
    import onnxruntime
    from export_attention import dense_model, sparse_model

    plan = drad.make_plan("dynamicrad", (tokens // 1024, 32, 32), 128, sparsity=0.8, compensate=1.0)
    q, k, v = torch.randn(3, 1, 4, tokens, 64).numpy()
    feed = {"q": q, "k": k, "v": v}
    if kind == "sparse":
        mask, weight = torch.ones(1, tokens, dtype=torch.bool), torch.ones(1)
        feed |= {"kv_counts": plan.kv_counts.numpy(), "kv_indices": plan.kv_indices.numpy()}
        feed |= {"kv_mask": mask.numpy(), "compensate": weight.numpy()}
    model = sparse_model(64, 128) if kind == "sparse" else dense_model(64)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    status = Path("/proc/self/status")
    before = _mib(status, "VmRSS")
    start = time.perf_counter()
    session.run(None, feed)
    return {"s": time.perf_counter() - start, "mib": _mib(status, "VmHWM") - before, "sparsity": plan.sparsity}


def _mib(status: Path, field: str) -> float:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) / 1024


def memory_table() -> str:
    """Dense and sparse attention at three lengths, a fresh process each."""
    rows = []
    for tokens in (4096, 8192, 16384):
        found = {}
        for kind in ("dense", "sparse"):
            done = subprocess.run(
                [sys.executable, __file__, "--attention", kind, str(tokens)], capture_output=True, text=True, check=True
            )
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        memory = [f"{found[kind]['mib']:.0f} MiB" for kind in ("dense", "sparse")]
        seconds = [f"{found[kind]['s']:.2f} s" for kind in ("dense", "sparse")]
        rows.append([f"{tokens:,}", f"{found['sparse']['sparsity']:.0%}", *memory, *seconds])
    return table(["tokens", "skipped", "dense: memory", "sparse", "dense: time", "sparse"], rows)


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--full", action="store_true", help="fixed and open batch for each mode")
    parser.add_argument("--no-memory", action="store_true", help="leave out the second table")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/export.md")
    parser.add_argument("--attention", nargs=2, metavar=("KIND", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.attention:
        print(json.dumps(attention_memory(args.attention[0], int(args.attention[1]))))
        return []
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    rows = [row for row in cases(args.formats, args.models, args.full) if row.mode in args.modes]
    memory = "" if args.no_memory else memory_table()
    for number, row in enumerate(rows, 1):
        try:
            run_case(row)
        except Exception as error:
            row.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        torch._dynamo.reset()
        print(f"{number}/{len(rows)} {' | '.join(row.cells())}", file=sys.stderr, flush=True)
        if args.save:  # after each case, so that an interrupted run leaves what it has
            (RESULTS / "export.md").write_text(_page(rows[:number], memory), encoding="utf-8")
    print(_page(rows, memory))
    return rows


def _page(rows: list[Row], memory: str) -> str:
    """The tables as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return "\n\n".join(
        [
            "# Exports",
            "Written by `benchmarks/export_table.py --save`; its docstring says what the columns are.",
            table(HEADER, [row.cells() for row in rows]),
            *([memory] if memory else []),
            f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}, {time.strftime('%Y-%m-%d')}.\n",
        ]
    )


def _versions() -> dict[str, str]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "onnx", "onnxruntime")}


if __name__ == "__main__":
    main()
