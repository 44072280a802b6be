"""The two measurements: attention alone, and one step of a transformer, dense and sparse in turn on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..plans.attention import block_sparse_attention
from ..plans.make import make_plan
from .clock import fastest

# Tokens after patchifying as (frames, height, width): the last three are 49 frames of 512x320, 49 of 672x480, 81 of
# 832x480 of Wan.
GRIDS = {
    "256": (4, 8, 8),
    "2k": (8, 16, 16),
    "4k": (8, 16, 32),
    "8k": (13, 20, 32),
    "16k": (13, 30, 42),
    "32k": (21, 30, 52),
}


@dataclass(frozen=True)
class Case:
    """What is measured: grid in latent tokens, heads and their size, share of blocks to skip, tokens of a block."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    sparsity: float
    block_size: int
    dtype: torch.dtype
    device: str
    repeats: int


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds of the fastest call of each side, and the gain that the skipped work allows.

    sparsity  share of the blocks of dense attention that the plan skips
    ideal     attention: 1 / (1 - sparsity); step: 1 / (1 - share x sparsity), share = FLOPs of attention / all FLOPs
    """

    what: str
    tokens: int
    sparsity: float
    dense: float
    sparse: float
    ideal: float

    @property
    def gain(self) -> float:
        """Dense time / sparse time."""
        return self.dense / self.sparse

    def __str__(self) -> str:
        times = f"{1e3 * self.dense:10.1f} {1e3 * self.sparse:10.1f}"
        gains = f"{self.gain:6.2f} {self.ideal:6.2f} {self.gain / self.ideal:9.0%}"
        return f"{self.what:10s} {self.tokens:7d} {self.sparsity:9.1%} {times} {gains}"


HEADER = (
    f"{'what':10s} {'tokens':>7s} {'skipped':>9s} {'dense ms':>10s} {'sparse ms':>10s} {'gain':>6s}  ideal  of ideal"
)


def attention_row(case: Case) -> Row:
    """Attention alone, [1, heads, tokens, head_dim]: scaled_dot_product_attention against our op, both eager.

    Raises PlanError for a sparsity or block size out of range.
    """
    plan = make_plan("dynamicrad", case.grid, case.block_size, sparsity=case.sparsity).to(case.device)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, case.heads, plan.q_len, case.head_dim)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(case.device, case.dtype)
    calls = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "sparse": lambda: block_sparse_attention(q, k, v, plan),
    }
    fastest(calls, 1, case.device)  # first touch of buffers, and Triton's compilation
    best = fastest(calls, case.repeats, case.device)
    return Row("attention", plan.q_len, plan.sparsity, best["dense"], best["sparse"], 1 / (1 - plan.sparsity))


def step_row(case: Case) -> Row:
    """One call of a transformer block by torch.compile: Inductor against backend="dynamicrad", random weights.

    Raises PlanError for a sparsity or block size out of range, and what the compiler raises.
    """
    plan = make_plan("dynamicrad", case.grid, case.block_size, sparsity=case.sparsity)
    torch.manual_seed(0)
    model = _Block(case.heads, case.head_dim).eval().to(case.device, case.dtype)
    video = torch.randn(1, _Block.CHANNELS, *case.grid, dtype=torch.float32, device="cpu").to(case.device, case.dtype)
    options: dict[str, Any] = {
        "pattern": "dynamicrad",
        "mode": "static_ratio",
        "sparsity": case.sparsity,
        "compensate": 0.0,
        "block_size": case.block_size,
        "grid": case.grid,
        "dense_layers": 0,
        "min_tokens": 0,
        "strict": True,
    }
    torch._dynamo.reset()
    with torch.no_grad():
        dense, sparse = torch.compile(model), torch.compile(model, backend="dynamicrad", options=options)
        calls = {"dense": lambda: dense(video), "sparse": lambda: sparse(video)}
        fastest(calls, 1, case.device)  # compiles
        best = fastest(calls, case.repeats, case.device)
    ideal = 1 / (1 - model.attention_share(plan.q_len) * plan.sparsity)
    return Row("step", plan.q_len, plan.sparsity, best["dense"], best["sparse"], ideal)


class _Block(nn.Module):
    """Patch embedding, self-attention and a feed-forward layer four times as wide, as a video transformer has them."""

    CHANNELS = 16

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.shape = (heads, head_dim)
        self.embed = nn.Linear(self.CHANNELS, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, video: Tensor) -> Tensor:
        """[B, channels, F, H, W] -> [B, tokens, width]."""
        x = self.embed(video.flatten(2).transpose(1, 2))
        y = self.norms[0](x)
        q, k, v = (project(y).unflatten(-1, self.shape).transpose(1, 2) for project in self.qkv)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x))

    def attention_share(self, tokens: int) -> float:
        """FLOPs of the attention's two products / FLOPs of all products of a call with a batch of 1."""
        width = self.shape[0] * self.shape[1]
        attention = 4 * tokens**2 * width
        linear = 2 * tokens * width * (self.CHANNELS + 4 * width + 8 * width)
        return attention / (attention + linear)
