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
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from zoo.models import ZOO, out_tensors

import dynamicrad_compile as drad
from dynamicrad_compile.exporting.checking import relative_error
from dynamicrad_compile.exporting.run import load
from dynamicrad_compile.runtime.router import Router

ROOT = Path(__file__).parents[1]

RESULTS = ROOT / "benchmarks" / "results"
GRID = {"f": 5, "h": 6, "w": 9}
MODELS = {"wan": "wan_t2v", "hunyuan": "hunyuan_video", "cogvideox": "cogvideox_5b", "ltx": "ltx"}
FORMATS = ("torch", "onnx", "aoti")
COMMON = {"min_tokens": 0, "block_size": 16, "compensate": 0.7}
MODES = ("static", "router", "dynamic")
DEPTHS = ("blocks", "transformer_blocks", "single_transformer_blocks")


@dataclass
class Row:
    """One case."""

    format: str
    model: str
    mode: str
    batch: str
    replaced: str = ""
    error: float = 0.0
    moved: float = 0.0
    size: int = 0
    export_s: float = 0.0
    load_s: float = 0.0
    failure: str = ""

    def cells(self) -> list[str]:
        """Cells of the table."""
        case = [self.format, self.model, self.mode, self.batch]
        if self.failure:
            return [*case, self.failure, "", "", "", "", ""]
        numbers = [f"{self.error:.1e}", f"{self.moved:.1e}", f"{self.size / 1e6:.2f} MB"]
        return [*case, self.replaced, *numbers, f"{self.export_s:.0f}", f"{self.load_s:.1f}"]


HEADER = ["format", "model", "mode", "batch", "replaced", "error", "moved", "size", "export s", "load s"]


def make(model: str, batch: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model with one layer of each kind, and its call."""
    module, kwargs, _ = ZOO[MODELS[model]](**GRID, batch=batch)
    for name in DEPTHS:
        layers = getattr(module, name, None)
        if layers is not None:
            setattr(module, name, layers[:1])
    return module, kwargs


def options_of(mode: str) -> tuple[dict[str, Any], Router | None]:
    """Options of a mode, and its router."""
    if mode == "static":
        return {**COMMON, "regime": "high"}, None
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    router = Router(weight - weight.mean(0), torch.zeros(3))
    kind = "dynamic_threshold" if mode == "dynamic" else "static_ratio"
    return {**COMMON, "mode": kind, "router": router}, router


def with_prompts(kwargs: dict[str, Any], router: Router | None) -> dict[str, Any]:
    """The call with prompts that the router sends to low, high, mid, ..."""
    if router is None:
        return kwargs
    prompts = kwargs["encoder_hidden_states"]
    order = torch.tensor([0, 2, 1])[torch.arange(len(prompts)) % 3]
    return {**kwargs, "encoder_hidden_states": (3 * router.weight[order, None]).expand(prompts.shape).contiguous()}


def run_case(row: Row) -> None:
    """Export, check and time one case."""
    options, router = options_of(row.mode)
    module, kwargs = make(row.model, 2)
    kwargs = with_prompts(kwargs, router)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        start = time.perf_counter()
        result = drad.export(
            module, (), kwargs, folder, row.format, options, dynamic_batch=row.batch == "open", check=True
        )
        check = result.card["check"]
        row.export_s = time.perf_counter() - start - result.seconds["check"]
        row.load_s, row.error = check["load_seconds"], check["relative_error"]
        row.size = sum(file.stat().st_size for file in result.files)
        row.replaced = f"{len(result.report.replaced)} of {len(result.report.sites)}"
        row.moved = relative_error(out_tensors(result.module(**kwargs))[0], out_tensors(module(**kwargs))[0])
        if row.batch == "open":
            loaded = load(row.format, result.path)
            for batch in (1, 3):
                other = with_prompts(make(row.model, batch)[1], router)
                found, expected = (out_tensors(run(**other))[0] for run in (loaded, result.module))
                row.error = max(row.error, relative_error(found, expected))


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


def cases(formats: list[str], models: list[str], full: bool = False) -> list[Row]:
    """The cases: a fixed batch for the static mode, an open one for the others; full: all combinations.

    AOTInductor compiles for half a minute: it is spared the mode in between.
    """
    modes = [("static", "2"), ("router", "open"), ("dynamic", "open")]
    if full:
        modes = [(mode, batch) for mode in MODES for batch in ("2", "open")]
    rows = [Row(f, m, *mode) for f in formats for m in models for mode in modes]
    return [row for row in rows if full or row.format != "aoti" or row.mode != "router"]


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
