"""Windowed attention: pieces of an axis are in the batch, the rest of it is in the sequence."""

from __future__ import annotations

from dynamicrad_compile.reporting.reason import NOTHING, Reason

from .concatenation import parts_of
from .kinship import roots
from .labels import Axis, Label, label_size, resolve


def windows(batch: Label, sequence: Label) -> Reason | None:
    """Why attention over `sequence` sees only windows of it; None if no axis is split between batch and sequence."""
    split = {root: axis for axis in resolve(batch) if axis.size > 1 for root in roots(axis) if not _is_batch(root)}
    axes = [axis for part in parts_of(sequence) for axis in resolve(part.label)]
    pairs = ((axis, next((split[root] for root in roots(axis) if root in split), None)) for axis in axes)
    shared = [(axis, outer) for axis, outer in pairs if outer is not None]
    if not shared:
        return None
    sizes = ", ".join(f"{outer.size} windows along {outer.source} of {axis.size}" for axis, outer in shared)
    text = f"windowed attention ({sizes}): only {label_size(sequence)} tokens see each other"
    return Reason("windowed", text, f"{NOTHING}: it is sparse already")


def _is_batch(axis: Axis) -> bool:
    """Whether an axis is the first dimension of an input: batch and frames may come in as one."""
    return axis.source.kind == "input" and axis.source.dim == 0
