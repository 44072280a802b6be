"""Where a model's video tokens are, by class: what `shard` has to cut, exchange and gather."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ShardPlan:
    """Names within a model. Video tokens are [B, S, C] between the first block and the module `out`.

    Each block takes the tokens as an argument and returns them; its self-attention is over the video tokens alone, or
    over video and text in one sequence, and is one or more calls of `F.scaled_dot_product_attention`.
    """

    blocks: tuple[str, ...]
    """The lists of blocks, in the order in which they run."""

    attention: str
    """The module of a block in which its self-attention is; nothing else attends there."""

    out: str
    """The module whose output is gathered: [B, rows, C]."""

    text: Literal["before", "after"] | None = None
    """Where text stands in the self-attention's sequence; None where there is none."""

    tokens: str = "hidden_states"
    """The blocks' argument with the video tokens."""

    tables: Mapping[str, int] = field(default_factory=lambda: {"image_rotary_emb": 0})
    """The blocks' arguments with a row a video token (tensors, tuples of them, or None), and in which dimension."""

    first: tuple[str, ...] = ()
    """The blocks' arguments that say how many of the first video tokens are treated apart."""

    local_mask: bool = False
    """Whether blocks build a mask [..., rows, rows] for the rows they are given. All video tokens are taken to be seen,
    and to see, alike; what padding of the text sees is not kept, since nothing sees it."""


PLANS = {
    "CogVideoXTransformer3DModel": ShardPlan(
        blocks=("transformer_blocks",), attention="attn1", out="proj_out", text="before"
    ),
    "EasyAnimateTransformer3DModel": ShardPlan(
        blocks=("transformer_blocks",), attention="attn1", out="proj_out", text="before"
    ),
    "HunyuanVideoTransformer3DModel": ShardPlan(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        attention="attn",
        out="proj_out",
        text="after",
        tables={"image_rotary_emb": 0, "freqs_cis": 0},
        first=("num_tokens",),
    ),
    "HunyuanVideo15Transformer3DModel": ShardPlan(
        blocks=("transformer_blocks",),
        attention="attn",
        out="proj_out",
        text="after",
        tables={"image_rotary_emb": 0, "freqs_cis": 0},
        local_mask=True,
    ),
    "MochiTransformer3DModel": ShardPlan(
        blocks=("transformer_blocks",), attention="attn1", out="proj_out", text="after"
    ),
}
"""Plans of classes of diffusers that bring none of their own."""
