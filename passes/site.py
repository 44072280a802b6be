"""What the passes know of one attention call (a *site*)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from dynamicrad_compile.plans.cost import covariances
from dynamicrad_compile.plans.layout import Range
from dynamicrad_compile.plans.plan import BlockPlan
from dynamicrad_compile.plans.table import PlanSpec, PlanTable
from dynamicrad_compile.reporting.reason import Reason

from .axes.labels import Label, Peers

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


class Group(NamedTuple):
    """Queries that a mask lets read the same keys: a range of the queries, and the ranges of these keys."""

    rows: Range
    keys: tuple[Range, ...]


@dataclass(frozen=True)
class Projections:
    """Weights of an attention that projects its own inputs and output (nn.MultiheadAttention), as nodes or None."""

    heads: int
    in_weight: fx.Node
    in_bias: fx.Node | None
    out_weight: fx.Node
    out_bias: fx.Node | None


@dataclass(frozen=True)
class AttentionCall:
    """One attention, softmax(scale * query key^T + mask) value, as nodes and constants.

    scale        None: 1 / sqrt(head_dim)
    layouts      dimensions of query, key, value and output: b batch, h heads, s tokens, d features, and t for
                 `sequences` sequences of equal length packed along one dimension
    mask_layout  dimensions that a mask of full rank has: b batch, h heads, q queries, k keys
    mask_is      "keep": bool, True where a key is attended; "drop": bool, False there; "bias": added to the scores
    output       position of the attention among the outputs of the node; None where the node yields just that
    key_end      starts of the one packed sequence [2]: keys from the second on are not attended
    dtype        of the computation, where operands are cast to it; None: the operands' own
    inner        other nodes that serve this attention alone (scores, softmax), in order; they go with it
    refusal      why this spelling can't be rewritten; None if it can
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    layouts: tuple[str, str, str, str] = ("bhsd", "bhsd", "bhsd", "bhsd")
    mask_layout: str = "bhqk"
    mask_is: str = "keep"
    output: int | None = None
    sequences: int | None = None
    key_end: fx.Node | None = None
    dtype: torch.dtype | None = None
    inner: tuple[fx.Node, ...] = ()
    projections: Projections | None = None
    refusal: Reason | None = None


@dataclass(frozen=True)
class Ring:
    """The attentions of a ring.

    pieces  their nodes; the first is over the keys of this process
    calls   their arguments
    ranks   the processes whose keys they read
    steps   the nodes between the output of the first and the merge: a cast, say
    merged  the node that holds the output
    group   of the collective that gathers keys and values, as the graph names it
    """

    pieces: tuple[fx.Node, ...]
    calls: tuple[AttentionCall, ...]
    ranks: tuple[int, ...]
    steps: tuple[fx.Node, ...]
    merged: fx.Node
    group: Any
    peers: Peers


@dataclass(frozen=True)
class Gathered:
    """A ring, and the attention over all keys that was written beside it.

    keys, values  [B, H, S, D] of all processes
    node          the attention
    out           what would take the place of the ring's output
    """

    ring: Ring
    keys: fx.Node
    values: fx.Node
    node: fx.Node
    out: fx.Node


class HeadExchange(NamedTuple):
    """The way of the heads of an attention to other processes and back, each with as many (see reading/heads).

    sent   (node, dim) of query, key and value: dimension `dim` of what the node reads are all heads, which it divides
    heard  (node, dim) of the output: where all heads are together again
    """

    sent: tuple[tuple[fx.Node, int], ...]
    heard: tuple[fx.Node, int]


@dataclass(frozen=True)
class Trace:
    """Where the tokens of a call come from.

    query, key    labels of their dimensions in the layout [batch, heads, tokens, features]
    same_tokens   both were computed from the same tokens by the same steps; see axes/streams.py
    given         both were projected outside the graph: of whose tokens they are the graph knows nothing
    starts        of fewer queries than keys: where among the keys the same tokens begin
    overlap       some of the tokens of both may be the same
    """

    query: list[Label]
    key: list[Label]
    same_tokens: bool
    given: bool = False
    starts: tuple[int, ...] = ()
    overlap: bool = False


@dataclass(frozen=True)
class Replacement:
    """What took the place of an attention.

    node      the op
    plan      the blocks that it reads; of all regimes, and all candidates where a selection thins them
    stats     name of the slot that adds up what its calls compute (see dynamicrad_compile.runtime.account); empty where
              the plan is all there is to know
    overhead  share of dense attention that covariances of dropped blocks add
    sparsity  share of dense attention that is expected to be skipped, without the overhead
    searches  name of the slot that adds up its searches; empty where there are none
    """

    node: fx.Node
    plan: BlockPlan
    stats: str = ""
    overhead: float = 0.0
    sparsity: float = 0.0
    searches: str = ""


@dataclass
class Site:
    """One attention call that was found, and what the passes say of it.

    q_shape, kv_length  query shape [batch, heads, tokens, head_dim] and number of keys; None where they are not known
    data_dependent      the number of tokens is known only when the graph runs; sizes here are stand-ins
    trace               None where tracing did not reach
    reason              why it stays dense; None if nothing speaks against replacing it
    grid, text          of a video, whether it is replaced or not; of the keys
    grid_axes           the three axes of its grid; () where the user alone knows it
    queries             (start, stop) of the keys whose tokens the queries are; None: all
    chunks              sites of its own, one for each group of queries to which its mask shows the same keys; in order
    group, of           of such a site: the group, and the site whose chunk it is
    mask_sizes          the symbolic sizes for which the chunks were found
    """

    node: fx.Node
    call: AttentionCall
    path: str
    q_shape: tuple[int, ...] | None = None
    kv_length: int | None = None
    data_dependent: bool = False
    trace: Trace | None = None
    role: str = UNKNOWN
    reason: Reason | None = None
    grid: tuple[int, int, int] | None = None
    grid_axes: Label = ()
    text: TextTokens = TextTokens(0, 0)
    queries: Range | None = None
    chunks: tuple[Site, ...] = ()
    group: Group | None = None
    of: Site | None = field(default=None, repr=False, compare=False)
    mask_sizes: tuple[torch.SymInt, ...] = ()
    replacement: Replacement | None = None

    @property
    def asked_text(self) -> TextTokens:
        """Tokens among the queries that are not on the grid, before and after the video."""
        if self.queries is None or self.kv_length is None:
            return self.text
        start, stop = self.queries
        return TextTokens(max(0, self.text.before - start), max(0, self.text.after - (self.kv_length - stop)))

    @property
    def replaced(self) -> bool:
        """Whether block-sparse attention took its place, or that of some of its chunks."""
        return self.replacement is not None or any(chunk.replaced for chunk in self.chunks)


@dataclass(frozen=True)
class VideoSite:
    """A video self-attention that can be replaced.

    grid   (frames, height, width) in latent tokens
    text   tokens of the sequence that are not on the grid
    shape  of the query, [batch, heads, tokens, head_dim]
    dtype  of the computation
    device of the query
    trace  of its site
    axes   the three axes of its grid; () where the user alone knows it
    queries  (start, stop) of the tokens that ask; None: all. All of grid and text are keys
    shard    the queries are those that this process holds; others ask with theirs
    peers    the processes that share its heads, each with as many; None: all are here
    exchange the way of its heads, where they can be dealt in another order; else None
    """

    site: Site
    grid: tuple[int, int, int]
    text: TextTokens
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    trace: Trace
    axes: Label
    queries: Range | None = None
    shard: bool = False
    peers: Peers | None = None
    exchange: HeadExchange | None = None

    @property
    def all_heads(self) -> int:
        """Heads of the model's attention, of which this process may have some."""
        return self.shape[1] * (1 if self.peers is None else self.peers.size)

    @property
    def heads(self) -> Range:
        """(start, stop) of these heads."""
        first = 0 if self.peers is None else self.peers.rank * self.shape[1]
        return first, first + self.shape[1]

    @property
    def node(self) -> fx.Node:
        """Where the graph holds it."""
        return self.site.node

    @property
    def call(self) -> AttentionCall:
        """Its arguments; they change when a site before it is replaced."""
        return self.site.call

    @property
    def path(self) -> str:
        """Dotted path of the module."""
        return self.site.path

    @property
    def whole_grid(self) -> tuple[int, int, int]:
        """Its grid, or of a chunk that of the whole video."""
        whole = self.site.of.grid if self.site.of is not None else None
        return whole or self.grid

    @property
    def keys(self) -> int:
        """Length of the sequence that it reads."""
        return math.prod(self.grid) + sum(self.text)

    @property
    def tokens(self) -> int:
        """Length of the sequence that asks."""
        return self.keys if self.queries is None else self.queries[1] - self.queries[0]

    @property
    def length(self) -> int:
        """Tokens by which it is judged whether sparse attention pays: of a shard those of the whole sequence."""
        return self.keys if self.shard else self.tokens


@dataclass(frozen=True)
class PlannedSite:
    """A video self-attention with its plan.

    table     the plans of all regimes, for the sizes at hand
    spec      how to make them for other sizes; None where that can't be
    at_least  fewer tokens than these would have stayed dense
    asked     (start, stop) of the tokens that its rows are for, where these are more than the queries; else None
    head_order  in which all heads are dealt to processes, equal numbers to each; None: as they come
    """

    video: VideoSite
    table: PlanTable
    spec: PlanSpec | None = None
    at_least: int = 0
    asked: Range | None = None
    head_order: tuple[int, ...] | None = None

    @property
    def overhead(self) -> float:
        """Share of dense attention that covariances of dropped blocks add."""
        plan = self.table.plan
        if not (plan.covariance and any(plan.compensate)):
            return 0.0
        return covariances(self.video.shape[-1], plan.kv_len, plan.block_q, plan.block_kv, plan.q_len)
