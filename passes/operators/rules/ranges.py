"""Consecutive integers in an index, as far as its making shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...axes.tensor_labels import Range, get_range
from ..calls import RangeRule


def arange(out: torch.Tensor, args: Sequence[Any]) -> Range | None:
    """Consecutive where the step is 1."""
    if out.is_floating_point() or (len(args) > 2 and args[2] != 1):
        return None
    return Range(0, int(args[0]) if len(args) > 1 else 0)


def kept(out: torch.Tensor, args: Sequence[Any]) -> Range | None:
    """The same integers."""
    return None if out.is_floating_point() else get_range(args[0])


def shifted(sign: int) -> RangeRule:
    """A number is added (`sign` 1) or taken off (-1)."""

    def rule(out: torch.Tensor, args: Sequence[Any]) -> Range | None:
        found = get_range(args[0])
        if found is None or len(args) != 2 or not isinstance(args[1], int):
            return None
        return Range(found.dim, found.start + sign * args[1])

    return rule


def slice_(out: torch.Tensor, args: Sequence[Any]) -> Range | None:
    """A slice of step 1 of a one-dimensional index."""
    found = get_range(args[0])
    if found is None or out.dim() != 1 or (len(args) > 4 and args[4] != 1):
        return None
    start = (args[2] if len(args) > 2 else 0) or 0
    return Range(0, found.start + (start if start >= 0 else start + args[0].shape[0]))


def unsqueeze(out: torch.Tensor, args: Sequence[Any]) -> Range | None:
    """A dimension of size 1 more."""
    found = get_range(args[0])
    return None if found is None else Range(found.dim + (args[1] % out.dim() <= found.dim), found.start)


def expand(out: torch.Tensor, args: Sequence[Any]) -> Range | None:
    """Repetition in other dimensions."""
    found = get_range(args[0])
    return None if found is None else Range(found.dim + out.dim() - args[0].dim(), found.start)


def view(out: torch.Tensor, args: Sequence[Any]) -> Range | None:
    """Dimensions of size 1 come and go."""
    found = get_range(args[0])
    if found is None or not args[0].numel() == args[0].shape[found.dim] == max(out.shape):
        return None
    return Range(list(out.shape).index(max(out.shape)), found.start)
