"""The entry of an operator: everything that the passes know of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..axes.labels import Label
from .calls import HidingRule, LabelRule, MaskRule, NumberRule, OrderRule, RangeRule, Shape, StreamRule
from .rules.streams import of_first


@dataclass(frozen=True)
class Operator:
    """What an operator does. What is left out is not known of it.

    Read while a graph runs on fake tensors, where torch has broken everything down to primitive operators:

    labels      how the axes of dimensions move. Without it the result has axes of its own, and a tensor that the
                operator writes in place is lost
    stream      which tokens its outputs are
    range       which consecutive integers an index that it makes holds

    Read from the nodes of a graph, where operators have the names that the model's author chose:

    order       in which order it takes the dimensions of its operand; for transpositions
    mask        how the dimensions of a mask move through it, whose elements it may only rearrange or repeat
    negates     it inverts the mask that goes through it
    hides       whether it makes a float mask that is 0 or very negative
    number      the number that it fills its result with
    view        its result shows elements of its first operand, in the same memory or in a copy
    new         its result is in memory of its own
    projects    it is a product with weights
    """

    labels: LabelRule | None = None
    stream: StreamRule = of_first
    range: RangeRule | None = None
    order: OrderRule | None = None
    mask: MaskRule | None = None
    negates: bool = False
    hides: HidingRule | None = None
    number: NumberRule | None = None
    view: bool = False
    new: bool = False
    projects: bool = False

    @property
    def carries_mask(self) -> bool:
        """Whether a mask can be followed through it."""
        return self.mask is not None or self.order is not None

    def mask_labels(self, node: fx.Node, labels: list[Label], inner: Shape, shape: Shape) -> list[Label] | None:
        """Labels of a mask after the operator; None where it is not followed.

        `labels` and `inner` are labels and shape before, `shape` is the shape after.
        """
        if self.order is not None:
            return [labels[d] for d in self.order(node, len(inner))]
        return self.mask(node, labels, inner, shape) if self.mask is not None else None
