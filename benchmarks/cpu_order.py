"""What an order of tokens costs on the CPU: one layer of attention, compiled, in raster order and in boxes.

    python benchmarks/cpu_order.py                     # 16 x 32 x 32 = 16,384 tokens, 4 heads of 128, blocks of 128

The layer is norm, projections, RoPE, self-attention and output projection, as in a DiT; both plans skip the same share
of blocks. Time is that of the process on all its threads, which other work on the machine changes little, taken in
turn, and the median of the differences is given as a share of the sparse attention alone. Also: how many kernels
Inductor made for either.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import metrics

import dynamicrad_compile as drad


class Layer(nn.Module):
    """Attention of a DiT over latents [B, C, F, H, W] of one token a pixel."""

    def __init__(self, grid: tuple[int, int, int], heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.patch = nn.Conv3d(16, width, 1)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        place = torch.arange(grid[0] * grid[1] * grid[2], dtype=torch.float32, device="cpu")
        angle = place[:, None] * torch.logspace(0, -4, head_dim // 2, dtype=torch.float32, device="cpu")
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def rotated(self, x: Tensor) -> Tensor:
        """x [B, H, S, D] turned by its place."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1).flatten(-2)

    def forward(self, latents: Tensor) -> Tensor:
        """Tokens [B, S, C]."""
        x = self.patch(latents).flatten(2).transpose(1, 2)
        q, k, v = (f(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self._projections())
        out = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)
        return x + self.to_out(out.transpose(1, 2).flatten(2))

    def _projections(self) -> tuple[nn.Module, ...]:
        return self.to_q, self.to_k, self.to_v


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a call by order, of the attention alone, and kernels."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # kernels out of a cache are not counted
    torch.manual_seed(0)
    grid = tuple(args.grid)
    layer = Layer(grid, args.heads, args.head_dim).eval().requires_grad_(False)
    latents = torch.randn(1, 16, *grid, dtype=torch.float32, device="cpu")
    found: dict[str, Any] = {"kernels": {}, "seconds": {"raster": [], "boxes": []}, "attention": []}
    box = tuple(args.box)
    common = {"profile": "default", "regime": "mid", "mode": "static_ratio", "sparsity": args.sparsity}
    common |= {"min_tokens": 0, "compensate": 0.0, "block_size": box[0] * box[1] * box[2]}
    calls, plans = {}, {}
    for name, given in (("raster", "raster"), ("boxes", box)):
        torch._dynamo.reset()
        metrics.reset()
        calls[name] = torch.compile(layer, backend="dynamicrad", options={**common, "box": given})
        calls[name](latents)
        found["kernels"][name] = metrics.generated_kernel_count
        plans[name] = drad.report(calls[name]).replaced[0].plan
    plan = plans["raster"]
    q, k, v = (torch.randn(1, args.heads, plan.q_len, args.head_dim, dtype=torch.float32, device="cpu") for _ in "qkv")
    for _ in range(args.repeats):
        for name, call in calls.items():
            found["seconds"][name].append(_seconds(lambda call=call: call(latents)))
        found["attention"].append(_seconds(lambda: drad.block_sparse_attention(q, k, v, plan)))
    return found


def _seconds(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=[16, 32, 32], help="frames, height, width (16 32 32)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--box", type=int, nargs=3, default=[8, 4, 4], help="of 16 to 256 tokens (8 4 4)")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    with torch.no_grad():
        found = measured(args)
    pairs = zip(found["seconds"]["boxes"], found["seconds"]["raster"], strict=True)
    more = statistics.median(boxes - raster for boxes, raster in pairs)
    attention = statistics.median(found["attention"])
    found["share"] = more / attention
    for name, seconds in found["seconds"].items():
        print(f"{name:7s} {1e3 * statistics.median(seconds):8.1f} ms a layer, {found['kernels'][name]} kernels")
    share = f"{1e3 * more:.1f} ms, {found['share']:.1%} of it"
    print(f"sparse attention alone {1e3 * attention:.1f} ms; the order adds {share}")
    return found


if __name__ == "__main__":
    main()
