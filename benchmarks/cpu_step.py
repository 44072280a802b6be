"""Dense against block-sparse on the CPU: attention alone, and a whole step of a Wan transformer.

    python benchmarks/cpu_step.py                     # two widths, 8k, 16k and 32k tokens
    python benchmarks/cpu_step.py --widths 1536 --tokens 8k --save my-machine

Both sides run in this process, in turn, on the same inputs: dense is torch.compile with PyTorch's scaled dot product
attention, sparse is backend="dynamicrad". Weights are random: the work does not depend on them. The fastest of the
repeated calls counts. Beside each gain stands the ideal,

    attention  1 / (1 - sparsity)
    step       1 / (1 - share x sparsity), share = FLOPs of self-attention / FLOPs of the step

--save NAME writes benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from diffusers import WanTransformer3DModel
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dynamicrad_compile as drad
from dynamicrad_compile.bench.clock import fastest, processor

# Tokens after patchifying as (frames, height, width): 49 frames of 512x320, 49 of 672x480, 81 of 832x480.
GRIDS = {"tiny": (3, 8, 10), "8k": (13, 20, 32), "16k": (13, 30, 42), "32k": (21, 30, 52)}
# Width -> heads, head_dim, ffn_dim. 1536 is Wan2.1-1.3B.
WIDTHS = {64: (2, 32, 128), 512: (8, 64, 3072), 1536: (12, 128, 8960)}
TEXT_DIM, TEXT_TOKENS = 4096, 512
RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One measurement. Seconds are those of the fastest call; shares and sparsity are in 0..1.

    attention_flops  share of self-attention in the FLOPs of a dense step
    attention_time   share of self-attention in the time of a dense step, from the two dense figures
    passes_share     seconds of the graph passes / seconds of the inner compiler
    """

    width: int
    tokens: int
    grid: tuple[int, int, int]
    layers: int
    sparsity: float
    plan_s: float
    attention_dense_s: float
    attention_sparse_s: float
    attention_gain: float
    attention_ideal: float
    step_dense_s: float
    step_sparse_s: float
    step_gain: float
    step_ideal: float
    attention_flops: float
    attention_time: float
    compile_dense_s: float
    compile_sparse_s: float
    passes_s: float
    passes_share: float


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; --quick is for tests of this script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1536], choices=sorted(WIDTHS))
    parser.add_argument("--tokens", nargs="+", default=["8k", "16k", "32k"], choices=GRIDS)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--compensate", type=float, default=0.0, help="weight of the mean keys of dropped blocks (0)")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each side (3)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (all cores)")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json and .md")
    parser.add_argument("--quick", action="store_true", help="one tiny case without code generation")
    args = parser.parse_args(argv)
    if args.quick:
        args.widths, args.tokens, args.repeats = [64], ["tiny"], 1
    return args


def attention_times(plan: drad.BlockPlan, heads: int, head_dim: int, repeats: int) -> dict[str, float]:
    """Seconds of dense and block-sparse attention, float32 [1, heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, plan.q_len, head_dim, generator=generator)
    calls = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "sparse": lambda: drad.block_sparse_attention(q, k, v, plan),
    }
    calls["sparse"]()  # first touch of buffers
    return fastest(calls, repeats)


def make_model(width: int, layers: int) -> WanTransformer3DModel:
    """A Wan transformer of diffusers with random weights."""
    heads, head_dim, ffn_dim = WIDTHS[width]
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        ffn_dim=ffn_dim,
        text_dim=TEXT_DIM,
        num_layers=layers,
    ).eval()


def make_inputs(grid: tuple[int, int, int]) -> dict[str, Any]:
    """Keyword arguments of the model for one video of `grid` tokens."""
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_DIM),
        "return_dict": False,
    }


def attention_share(width: int, layers: int, grid: tuple[int, int, int]) -> float:
    """Share of self-attention in the FLOPs of a dense step, counted on fake tensors."""
    # The math backend is made of matrix products, which the counter knows on every device.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        make_model(width, layers)(**make_inputs(grid))
    tokens = grid[0] * grid[1] * grid[2]
    return 4 * tokens**2 * width * layers / counter.get_total_flops()


def measure(width: int, size: str, args: argparse.Namespace) -> Row:
    """All figures of one width and length."""
    grid = GRIDS[size]
    heads, head_dim, _ = WIDTHS[width]
    start = time.perf_counter()
    plan = drad.make_plan("dynamicrad", grid=grid, sparsity=args.sparsity, compensate=args.compensate)
    plan_s = time.perf_counter() - start
    attention = attention_times(plan, heads, head_dim, args.repeats)

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = make_model(width, args.layers), make_inputs(grid)
    options: dict[str, Any] = {"sparsity": args.sparsity, "compensate": args.compensate}
    if args.quick:
        options |= {"min_tokens": 0, "inner": "eager"}
    compiled = {
        "dense": torch.compile(model, backend="eager" if args.quick else "inductor"),
        "sparse": torch.compile(model, backend="dynamicrad", options=options),
    }
    calls = {name: lambda f=f: f(**inputs) for name, f in compiled.items()}
    with torch.no_grad():
        first = fastest(calls, 1)
        step = fastest(calls, args.repeats)
    report = drad.report(compiled["sparse"])
    if len(report.replaced) != args.layers:
        sys.exit(f"not every layer was replaced, so there is nothing to measure:\n{report}")

    share = attention_share(width, args.layers, grid)
    sparsity = plan.sparsity
    return Row(
        width=width,
        tokens=plan.q_len,
        grid=grid,
        layers=args.layers,
        sparsity=sparsity,
        plan_s=plan_s,
        attention_dense_s=attention["dense"],
        attention_sparse_s=attention["sparse"],
        attention_gain=attention["dense"] / attention["sparse"],
        attention_ideal=1 / (1 - sparsity),
        step_dense_s=step["dense"],
        step_sparse_s=step["sparse"],
        step_gain=step["dense"] / step["sparse"],
        step_ideal=1 / (1 - share * sparsity),
        attention_flops=share,
        attention_time=args.layers * attention["dense"] / step["dense"],
        compile_dense_s=first["dense"] - step["dense"],
        compile_sparse_s=first["sparse"] - step["sparse"],
        passes_s=report.seconds["passes"],
        passes_share=report.seconds["passes"] / report.seconds["compile"],
    )


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that tells whose machine it is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dynamicrad": drad.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(rows: list[Row]) -> str:
    """Two Markdown tables: attention alone and whole steps."""
    attention = [
        "| width | tokens | dense attention | sparse | gain | ideal | of ideal | plan |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    step = [
        "| width | tokens | dense step | sparse | gain | ideal | of ideal | attention's share (FLOPs, time) "
        "| passes / compile |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        attention.append(
            f"| {r.width} | {r.tokens:,} | {_seconds(r.attention_dense_s)} | {_seconds(r.attention_sparse_s)} "
            f"| {r.attention_gain:.2f}x | {r.attention_ideal:.2f}x | {r.attention_gain / r.attention_ideal:.0%} "
            f"| {_seconds(r.plan_s)} |"
        )
        step.append(
            f"| {r.width} | {r.tokens:,} | {_seconds(r.step_dense_s)} | {_seconds(r.step_sparse_s)} "
            f"| {r.step_gain:.2f}x | {r.step_ideal:.2f}x | {r.step_gain / r.step_ideal:.0%} "
            f"| {r.attention_flops:.0%}, {r.attention_time:.0%} | {r.passes_share:.1%} |"
        )
    return "\n".join(["Attention alone:", "", *attention, "", "Whole step:", "", *step])


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def save(name: str, rows: list[Row], args: argparse.Namespace) -> None:
    """Write results/NAME.json and NAME.md."""
    about = machine()
    command = f"python benchmarks/cpu_step.py --widths {' '.join(map(str, args.widths))} --tokens "
    command += f"{' '.join(args.tokens)} --sparsity {args.sparsity} --compensate {args.compensate} "
    command += f"--layers {args.layers} --repeats {args.repeats}"
    RESULTS.mkdir(exist_ok=True)
    content = {"command": command, "machine": about, "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = f"# {name}\n\n    {command}\n\n{facts}\n\n{table(rows)}\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure every case, print the tables, save them if asked."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for width, size in itertools.product(args.widths, args.tokens):
        print(f"width {width}, {size} tokens ...", file=sys.stderr, flush=True)
        # Without caches compile times are those of a first compilation.
        with torch._inductor.config.patch(force_disable_caches=True):
            rows.append(measure(width, size, args))
        print(table(rows[-1:]), "\n", file=sys.stderr, flush=True)
    print(table(rows))
    if args.save:
        save(args.save, rows, args)
    return rows


if __name__ == "__main__":
    main()
