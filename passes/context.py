"""The state that the passes over one graph share: what was asked for, what they have found, and what was decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from dynamicrad_compile.reporting.reason import Reason
from dynamicrad_compile.runtime.pool import Slot

from .axes.labels import Axis, Label, resolve
from .axes.streams import Stream, Streams
from .graph import hint, value_of
from .site import Gathered, PlannedSite, Site, VideoSite


@dataclass(frozen=True)
class Conditions:
    """Inputs of a graph that condition a call: timestep, prompt embedding [B, L, C], its mask [B, L]; None if none."""

    timestep: fx.Node | None = None
    prompt: fx.Node | None = None
    mask: fx.Node | None = None

    @property
    def embedding_dim(self) -> int | None:
        """Features of the prompt embedding."""
        return None if self.prompt is None else hint(value_of(self.prompt).shape[-1])


@dataclass(frozen=True)
class Control:
    """What a graph decides when it runs.

    router          tensors of the motion router, which chooses a plan's regime (Router.tensors); None: one regime
    masked          the router takes the prompt's mask
    dense_steps     this many first denoising steps stay dense
    dense_timestep  steps on the noisy side of this timestep stay dense; None: none
    refresh_steps   select_blocks chooses anew at every so many steps; 0: at every call
    has_clock       drad.compile keeps a clock beside the graph; else the graph has its own
    has_regimes     drad.compile keeps the regimes beside the graph; else the graph finds them
    """

    router: tuple[torch.Tensor, ...] | None = None
    masked: bool = False
    dense_steps: int = 0
    dense_timestep: float | None = None
    refresh_steps: int = 0
    has_clock: bool = False
    has_regimes: bool = False

    @property
    def gates(self) -> bool:
        """Whether some steps stay dense."""
        return self.dense_steps > 0 or self.dense_timestep is not None


@dataclass(frozen=True)
class Dense:
    """A decision to leave a video self-attention dense.

    asked      because the options say so
    below      so many tokens would not have stayed dense; None: the number of tokens does not matter
    this_grid  another grid might not have stayed dense
    """

    reason: Reason
    asked: bool = False
    below: int | None = None
    this_grid: bool = False


@dataclass(frozen=True)
class Decisions:
    """What is to be done with the video self-attentions of one graph.

    sites    for each of them its plan, or why it stays dense
    control  what the graph decides when it runs
    notes    what was picked
    unmet    wishes that can't be met
    profiles names of the profiles in use
    """

    sites: Sequence[PlannedSite | Dense] = ()
    control: Control = Control()
    notes: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()


Policy = Callable[[Sequence[VideoSite], Conditions], Decisions]
Watch = Callable[[str, fx.GraphModule, "PassContext"], None]


@dataclass
class Earlier:
    """What was learnt of the values of graphs that were cut off before this one.

    values   labels and stream of each tensor, by its name
    streams  the terms of all of these graphs
    inputs   names of this graph's inputs, in order
    outputs  names of its outputs, by their position
    """

    values: dict[str, tuple[list[Label], Stream | None]] = field(default_factory=dict)
    streams: Streams = field(default_factory=Streams)
    inputs: Sequence[str] = ()
    outputs: Mapping[int, str] = field(default_factory=dict)

    def known(self, place: int) -> tuple[list[Label], Stream | None]:
        """Labels and stream of an input, none where nothing is known."""
        return self.values.get(self.inputs[place], ([], None)) if place < len(self.inputs) else ([], None)


@dataclass
class Seen:
    """What graphs of the same code have shown in position tables: how many a video, how many a single frame."""

    videos: int = 0
    frames: int = 0


@dataclass
class PassContext:
    """State of one run of the passes over one graph.

    decide        what is to be done with the video self-attentions; options and profile are not known here
    grid          the user's grid, or None
    training      the graph will be differentiated
    example_inputs  values of the placeholders, in order; real tensors where Dynamo calls
    qk_int8       when scores come from queries and keys rounded to int8
    is_final      other sizes get no other graph (an exported program); where plans can't follow them, sites stay dense
    override_grid  the user's grid counts even where the graph shows another one
    continues     why the graph goes on where another one ended; "": it does not
    earlier       what is known of the graphs that were cut off before this one; None where none were
    seen          what graphs of the same code have shown before
    watch         sees the graph before the first pass ("captured") and after each, by its name

    The rest is what the passes find: rings, sites, those of them that are videos, of these the planned ones; and what
    they need at run time: slots are the inputs that were added behind the graph's own.
    """

    decide: Policy
    grid: tuple[int, int, int] | None = None
    training: bool = False
    example_inputs: Sequence[Any] = ()
    qk_int8: Literal["never", "dense steps", "always"] = "never"
    is_final: bool = False
    override_grid: bool = False
    continues: str = ""
    earlier: Earlier | None = None
    seen: Seen = field(default_factory=Seen)
    watch: Watch = lambda step, gm, context: None
    rings: list[Gathered] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    node_labels: dict[fx.Node, list[Label]] = field(default_factory=dict)
    videos: list[VideoSite] = field(default_factory=list)
    conditions: Conditions = Conditions()
    decisions: Decisions = Decisions()
    planned: list[PlannedSite] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def size_of(self, axis: Axis) -> int | torch.SymInt:
        """The size of an axis as the graph has it, symbolic where some shape shows it so."""
        for node, labels in self.node_labels.items():
            for dim, label in enumerate(labels):
                if resolve(label) == (axis,) and isinstance(size := value_of(node).shape[dim], torch.SymInt):
                    return size
        return axis.size


Pass = Callable[[torch.fx.GraphModule, PassContext], int]
