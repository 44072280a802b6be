"""`dynamicrad bench`: dense against block-sparse on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from ..bench.measure import GRIDS
from ..errors import DynamicRadError
from .status import status

# Default sizes: what takes a minute or two on two cores, and what fills a GPU.
TOKENS = {"cpu": ["2k", "4k", "8k"], "cuda": ["8k", "16k", "32k"]}
SHAPE = {"cpu": (4, 64), "cuda": (24, 128)}
MAX_HEAD_DIM = 256
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def add_bench(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time dense against block-sparse attention, and a whole step, on this machine",
        description="Time attention alone at some lengths and one compiled transformer block at the longest of them, "
        "dense and sparse in turn in one process. The fastest call of each counts.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda, or cpu where there is none)")
    parser.add_argument("--tokens", nargs="+", choices=GRIDS, help="lengths (cpu: 2k 4k 8k, cuda: 8k 16k 32k)")
    parser.add_argument("--heads", type=int, help="(cpu: 4, cuda: 24)")
    parser.add_argument("--head-dim", type=int, help="(cpu: 64, cuda: 128)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(cpu: float32, cuda: bfloat16)")
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of blocks to skip (0.8)")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a block (128)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each side (3)")
    parser.add_argument("--no-step", action="store_true", help="attention alone: nothing is compiled")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    import torch

    from .. import make_plan
    from ..bench.clock import machine
    from ..bench.measure import HEADER, Case, attention_row, step_row

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise DynamicRadError("--device cuda: PyTorch sees no GPU here; `dynamicrad doctor` says more.")
    heads, head_dim = (SHAPE[device][i] if n is None else n for i, n in enumerate((args.heads, args.head_dim)))
    if min(heads, head_dim, args.repeats) < 1:
        raise DynamicRadError("--heads, --head-dim and --repeats must be at least 1.")
    if head_dim > MAX_HEAD_DIM:
        raise DynamicRadError(f"--head-dim must be at most {MAX_HEAD_DIM}, got {head_dim}.")
    make_plan("dynamicrad", GRIDS["256"], args.block_size, sparsity=args.sparsity)  # mistakes are told before the table
    dtype = args.dtype or DTYPE[device]
    about = f"{machine(device)}; {heads} heads of {head_dim}, {dtype}, blocks of {args.block_size}"
    rows = []
    if not args.json:
        print(f"{about}\n\n{HEADER}", flush=True)
    tokens = args.tokens or TOKENS[device]
    work = [(attention_row, size) for size in tokens] + ([] if args.no_step else [(step_row, tokens[-1])])
    for number, (measure, size) in enumerate(work, 1):
        status(f"{number} of {len(work)}: {measure.__name__.removesuffix('_row')}, {size} tokens ...")
        case = Case(
            GRIDS[size], heads, head_dim, args.sparsity, args.block_size, getattr(torch, dtype), device, args.repeats
        )
        rows.append(measure(case))
        status("")
        if not args.json:
            print(rows[-1], flush=True)
    if args.json:
        print(json.dumps({"about": about, "rows": [{**asdict(row), "gain": row.gain} for row in rows]}, indent=2))
    return 0
