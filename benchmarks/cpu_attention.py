"""Attention alone on the CPU: dense SDPA against our op and two other ways to do block-sparse attention.

    OMP_NUM_THREADS=2 python benchmarks/cpu_attention.py --tokens 8192 16384 32768

op       dynamicrad::block_sparse_attention (gathered blocks, batched GEMMs, eager PyTorch)
flex     FlexAttention compiled by Inductor, the plan as full blocks; a peer, returns no lse on CPU
gather   one SDPA call per query block on gathered keys and values; a peer

Times are the best of --repeats rounds in which the paths take turns, so that a busy machine slows all of them
alike. "first" is the first call, with whatever it compiles. "error" is the largest difference from SDPA under
a dense mask, for lengths up to 8192 with float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dynamicrad_compile.kernels.block_sparse_attention import block_sparse_attention
from dynamicrad_compile.kernels.reference import token_mask
from dynamicrad_compile.plan import BlockPlan, cdiv

SHAPES = [(12, 128), (4, 64)]


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


def seconds(call: Callable[[], torch.Tensor]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(tokens: int, heads: int, dim: int, args: argparse.Namespace) -> None:
    """Print one line per path for one shape."""
    dtype = getattr(torch, args.dtype)
    # As a model has them: permuted from [B, S, H, D].
    q, k, v = (torch.randn(1, tokens, heads, dim).to(dtype).transpose(1, 2) for _ in range(3))
    plan = random_plan(tokens, args.block, args.sparsity)
    paths: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "op": lambda: block_sparse_attention(q, k, v, plan),
    }
    if "flex" in args.paths:
        from torch.nn.attention.flex_attention import flex_attention

        compiled, block_mask = torch.compile(flex_attention, dynamic=True), plan.to_block_mask()
        paths["flex"] = lambda: compiled(q, k, v, block_mask=block_mask)
    if "gather" in args.paths and tokens % args.block == 0:
        paths["gather"] = lambda: gather_sdpa(q, k, v, plan)

    first = {name: seconds(call) for name, call in paths.items()}
    best = dict.fromkeys(paths, float("inf"))
    for _ in range(args.repeats):
        for name, call in paths.items():
            best[name] = min(best[name], seconds(call))
    errors = dict.fromkeys(paths, float("nan"))
    if tokens <= 8192 and dtype == torch.float32:
        mask = token_mask(plan.kv_counts, plan.kv_indices, plan.block_q, plan.block_kv, tokens, tokens)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        errors |= {name: float((call() - expected).abs().max()) for name, call in paths.items() if name != "dense"}
    for name in paths:
        print(
            f"| {tokens} | {heads} x {dim} | {plan.sparsity:.3f} | {name} | {1e3 * best[name]:.0f} "
            f"| {best['dense'] / best[name]:.2f} | {first[name]:.2f} | {errors[name]:.1e} |",
            flush=True,
        )


def main() -> None:
    """Run every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--shapes", nargs="+", default=[f"{h}x{d}" for h, d in SHAPES], help="heads x head_dim")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--paths", nargs="*", default=["flex", "gather"], choices=["flex", "gather"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, blocks of {args.block}\n")
    print("| tokens | heads x dim | sparsity | path | ms | x dense | first s | error |\n" + "|---" * 8 + "|")
    for shape in args.shapes:
        heads, dim = map(int, shape.split("x"))
        for tokens in args.tokens:
            measure(tokens, heads, dim, args)


if __name__ == "__main__":
    main()
