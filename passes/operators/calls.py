"""What a rule is given: the trace it is a part of, or the call it is to judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..axes.labels import Label, Source
from ..axes.shards import Shards
from ..axes.streams import Stream, Streams
from ..axes.tensor_labels import Range

Shape = tuple[int, ...]


class AxisTrace(Protocol):
    """What a rule for labels may ask of the trace: the running node, terms and shards of the graph, sources in it."""

    node: str
    streams: Streams
    shards: Shards

    def source(self, dim: int = 0, kind: str = "op") -> Source:
        """Source of an axis born in the running node."""


@dataclass(frozen=True)
class StreamCall:
    """One call of a primitive operator, after it was run on fake tensors.

    streams   terms of the graph
    name      canonical name of the operator
    outs      its outputs as a list; what is no tensor is kept in place
    """

    streams: Streams
    name: str
    outs: Sequence[Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]

    @functools.cached_property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors among the arguments, in order."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, torch.Tensor)]

    def dim(self, at: int, rank: int) -> int:
        """The argument `dim`, by position `at` or by name, counted from the front; 0 where it is left out."""
        given = self.args[at] if len(self.args) > at else self.kwargs.get("dim", 0)
        return int(given % max(rank, 1))


class Hiding(Protocol):
    """What a rule may ask of the walk that looks for hidden keys in a float mask; `node` is the node it judges."""

    node: fx.Node

    def hides(self, value: Any) -> bool:
        """Whether a value is 0 where a key is attended and very negative elsewhere."""

    def is_level(self, value: Any) -> bool:
        """Whether a value is the number 0, or a number low enough to hide a key."""

    def is_scaled_flag(self, flag: Any, factor: Any) -> bool:
        """Whether a value is 0 or 1, and a factor a number low enough to hide a key."""


LabelRule = Callable[[AxisTrace, Any, Sequence[Any], dict[str, Any]], Any]
"""(trace, output, args, kwargs) -> labels of the output's dimensions (a list of those where it has several outputs),
None where nothing is known."""

StreamRule = Callable[[StreamCall], "list[Stream | None]"]
"""Streams of the outputs, before anything is written in place. At least one tensor is among the arguments."""

RangeRule = Callable[[torch.Tensor, Sequence[Any]], "Range | None"]
"""(output, args) -> the consecutive integers that the output holds, None where it holds others."""

OrderRule = Callable[[fx.Node, int], "list[int]"]
"""(node, rank of its operand) -> the order in which it takes the operand's dimensions."""

MaskRule = Callable[[fx.Node, "list[Label]", Shape, Shape], "list[Label] | None"]
"""(node, labels of its operand, shape of the operand, shape of the node) -> labels, None where it is not followed."""

HidingRule = Callable[[Hiding], bool]
"""Whether the node of a walk makes a float mask that is 0 where a key is attended and very negative elsewhere."""

NumberRule = Callable[[fx.Node, Callable[[Any], "float | None"]], "float | None"]
"""(node, number of a value) -> the number that the node fills its result with, None where it is none."""
