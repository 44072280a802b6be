"""What the passes know of one attention call (a *site*), and the state they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from dynamicrad_compile.plan import BlockPlan

from ._axes import Label

VIDEO = "video_self_attention"
SPATIAL = "spatial_attention"
TEMPORAL = "temporal_attention"
CROSS = "cross_attention"
OTHER_SELF = "self_attention"
UNKNOWN = "unknown"


class TextTokens(NamedTuple):
    """Tokens of the sequence that are not on the grid: before and after the video."""

    before: int
    after: int


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one scaled_dot_product_attention call, as nodes and constants."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


@dataclass
class Site:
    """One attention call on its way through the passes; each pass fills its own fields."""

    node: fx.Node
    call: AttentionCall
    path: str
    q_shape: tuple[int, ...] | None = None
    kv_length: int | None = None
    data_dependent: bool = False  # the number of tokens is known only when the graph runs; sizes here are stand-ins
    labels: tuple[list[Label], list[Label]] | None = None  # of query and key; None where tracing did not reach
    role: str = UNKNOWN
    reason: str = ""  # why it stays dense; empty if nothing speaks against replacing it
    grid: tuple[int, int, int] | None = None
    grid_axes: Label = ()  # its three axes where the grid was traced
    text: TextTokens = TextTokens(0, 0)
    plan: BlockPlan | None = None  # for the sizes at hand
    plan_spec: str = ""  # how to make the plan for other sizes; see dynamicrad_compile.plan_op
    replaced: bool = False


PlanBuilder = Callable[[Site], "BlockPlan | None"]


@dataclass
class PassContext:
    """State of one run of the passes over one graph.

    build_plan    makes the plan of a classified site; may set `site.reason` and return None to leave it dense
    grid          the user's grid, or None
    training      the graph will be differentiated
    example_inputs  values of the placeholders, in order; real tensors where Dynamo calls
    """

    build_plan: PlanBuilder
    grid: tuple[int, int, int] | None = None
    training: bool = False
    example_inputs: Sequence[Any] = ()
    sites: list[Site] = field(default_factory=list)
    node_labels: dict[fx.Node, list[Label]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


Pass = Callable[[torch.fx.GraphModule, PassContext], int]
