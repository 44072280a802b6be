"""Attention alone on the CPU: dense SDPA against our op and two other ways to do block-sparse attention.

    OMP_NUM_THREADS=2 python benchmarks/cpu_attention.py --name cpu_attention_epyc_avx2

dense    scaled_dot_product_attention
op       dynamicrad::block_sparse_attention (gathered blocks, batched GEMMs, eager PyTorch)
op+mean  the op with compensation
op+cov   the op with compensation by covariances
flex     FlexAttention compiled by Inductor, the plan as full blocks; a peer, returns no lse on CPU
gather   one SDPA call per query block on gathered keys and values; a peer

Times are the best of --repeats rounds in which the paths take turns, so that a busy machine slows all of them
alike; --clock cpu counts the CPU time of the process divided by its threads instead of wall time. "of ideal" is the
gain over dense times the share of blocks kept; "over mean" is the median over rounds of the time over that of op+mean
in the same round. "first" is the first call, with whatever it compiles. "memory" is
the most resident memory a call adds, its output included. "error" is the largest difference from SDPA under a
dense mask, for lengths up to 8192 with float32.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from dynamicrad_compile.bench.clock import processor
from dynamicrad_compile.kernels.attention_reference import token_mask
from dynamicrad_compile.kernels.blocks import cdiv
from dynamicrad_compile.plans.attention import block_sparse_attention
from dynamicrad_compile.plans.plan import BlockPlan

SHAPES = ["2x64", "2x128"]
RESULTS = Path(__file__).parent / "results"
STATM = Path("/proc/self/statm")


def random_plan(tokens: int, block: int, sparsity: float) -> BlockPlan:
    """A plan with the same number of random blocks in each row: the worst case for locality."""
    m = cdiv(tokens, block)
    rank = torch.rand(m, m).argsort(-1).argsort(-1)
    mask = rank < max(1, round(m * (1 - sparsity)))
    return BlockPlan.from_mask(mask, block_q=block, block_kv=block, q_len=tokens, kv_len=tokens)


def gather_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """One SDPA call per query block; needs lengths that divide by the block."""
    out = torch.empty(q.shape, dtype=q.dtype)
    keys, values = (x.unflatten(2, (-1, plan.block_kv)) for x in (k, v))
    for row, count in enumerate(plan.kv_counts[0, 0].tolist()):
        ids = plan.kv_indices[0, 0, row, :count]
        own = slice(row * plan.block_q, (row + 1) * plan.block_q)
        gathered = (x[:, :, ids].flatten(2, 3) for x in (keys, values))
        out[:, :, own] = F.scaled_dot_product_attention(q[:, :, own], *gathered)
    return out


def seconds(call: Callable[[], torch.Tensor], clock: str) -> float:
    """Wall time of one call, or CPU time per thread."""
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    call()
    return (now() - start) / (1 if clock == "wall" else torch.get_num_threads())


def peak_memory(call: Callable[[], torch.Tensor]) -> float:
    """MiB of resident memory that a call adds at most, sampled each millisecond; NaN without /proc."""
    if not STATM.is_file():
        return float("nan")
    done, samples = threading.Event(), [int(STATM.read_text().split()[1])]

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(int(STATM.read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    samples.append(int(STATM.read_text().split()[1]))
    done.set()
    watcher.join()
    del result
    return (max(samples) - samples[0]) * 4096 / 2**20


def measure(tokens: int, heads: int, dim: int, dtype: torch.dtype, args: argparse.Namespace) -> list[str]:
    """One line per path for one shape."""
    # As a model has them: permuted from [B, S, H, D].
    q, k, v = (torch.randn(1, tokens, heads, dim).to(dtype).transpose(1, 2) for _ in range(3))
    plan = random_plan(tokens, args.block, args.sparsity)
    paths: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "op": lambda: block_sparse_attention(q, k, v, plan),
        "op+mean": lambda: block_sparse_attention(q, k, v, plan, compensate=1.0),
        "op+cov": lambda: block_sparse_attention(q, k, v, plan, compensate=1.0, covariance=True),
    }
    if "flex" in args.paths:
        from torch.nn.attention.flex_attention import flex_attention

        compiled, block_mask = torch.compile(flex_attention, dynamic=True), plan.to_block_mask()
        paths["flex"] = lambda: compiled(q, k, v, block_mask=block_mask)
    if "gather" in args.paths and tokens % args.block == 0:
        paths["gather"] = lambda: gather_sdpa(q, k, v, plan)

    first = {name: seconds(call, "wall") for name, call in paths.items()}
    rounds = [{name: seconds(call, args.clock) for name, call in paths.items()} for _ in range(args.repeats)]
    best = {name: min(times[name] for times in rounds) for name in paths}
    over_mean = {name: statistics.median(times[name] / times["op+mean"] for times in rounds) - 1 for name in paths}
    memory = {name: peak_memory(call) for name, call in paths.items()}
    errors = dict.fromkeys(paths, float("nan"))
    if tokens <= 8192 and dtype == torch.float32:
        mask = token_mask(plan.kv_counts, plan.kv_indices, plan.block_q, plan.block_kv, tokens, tokens)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        exact = [name for name in paths if name not in ("dense", "op+mean", "op+cov")]
        errors |= {name: float((paths[name]() - expected).abs().max()) for name in exact}
    lines = []
    for name in paths:
        gain = best["dense"] / best[name]
        ideal = "" if name == "dense" else f"{100 * gain * (1 - plan.sparsity):.0f} %"
        lines.append(
            f"| {tokens} | {heads} x {dim} | {str(dtype).split('.')[1]} | {plan.sparsity:.3f} | {name} "
            f"| {1e3 * best[name]:.0f} | {gain:.2f} | {ideal} | {best[name] / best['op'] - 1:+.1%} "
            f"| {over_mean[name]:+.1%} | {memory[name]:.0f} | {first[name]:.2f} | {errors[name]:.1e} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="heads x head_dim")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--paths", nargs="*", default=[], choices=["flex", "gather"], help="peers to time as well")
    parser.add_argument("--note", default="", help="a line for the results, such as what else ran")
    parser.add_argument("--name", help="write benchmarks/results/<name>.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    lines = [
        f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads, torch {torch.__version__}, "
        f"{datetime.date.today()}, blocks of {args.block}, {args.clock} time. {args.note}".strip(),
        "",
        "| tokens | heads x dim | dtype | sparsity | path | ms | x dense | of ideal | over op | over mean "
        "| memory MiB | first s | error |",
        "|---" * 13 + "|",
    ]
    print("\n".join(lines))
    for dtype in args.dtypes:
        for shape in args.shapes:
            heads, dim = map(int, shape.split("x"))
            for tokens in args.tokens:
                lines += measure(tokens, heads, dim, getattr(torch, dtype), args)
    if args.name:
        command = " ".join(["python benchmarks/cpu_attention.py", *(repr(x) if " " in x else x for x in sys.argv[1:])])
        text = "\n".join([f"# {args.name}", "", f"    {command}", "", *lines, ""])
        RESULTS.mkdir(exist_ok=True)
        partial = RESULTS / f".{args.name}.partial"
        partial.write_text(text)
        partial.replace(RESULTS / f"{args.name}.md")


if __name__ == "__main__":
    main()
