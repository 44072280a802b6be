"""Tensors by their runs: what a large tensor holds where few of its rows differ, such as a block-causal mask.

A tensor is cut into runs along each dimension; all elements of one box of runs are equal. A block-causal mask over 21
frames of 1,560 tokens is 21 x 21 values and twice 21 ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

MAX_VALUES = 1 << 22
"""Values that a tensor may have."""


class UnknownValueError(Exception):
    """A value depends on more than numbers, or would be too large."""


class Runs(torch.Tensor):
    """A tensor of which each dimension is cut into runs.

    values  what it holds, one element a box of runs
    ends    for each dimension int64 [runs], one past the last row of each run
    shows   (tensor, dim, start, stop) of which it is the rows; dim -1: of which it is a view that is not followed
    writes  how often the tensor in whose memory it is had been written when it was right
    """

    values: torch.Tensor
    ends: tuple[torch.Tensor, ...]
    shows: tuple[Runs, int, int, int] | None
    writes: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, ends: Sequence[torch.Tensor]) -> Runs:
        size = [int(end[-1]) if len(end) else 0 for end in ends]
        make: Any = torch.Tensor._make_wrapper_subclass
        self: Runs = make(cls, size, dtype=values.dtype, device="cpu")
        self.values, self.ends, self.shows, self.writes = values, tuple(ends), None, 0
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnknownValueError(f"{func} outside of an evaluation")

    @property
    def root(self) -> Runs:
        """The tensor in whose memory it is."""
        return self if self.shows is None else self.shows[0].root


def runs_of(tensor: torch.Tensor) -> Runs:
    """A tensor as runs."""
    return coarse(tensor, [each(n) for n in tensor.shape])


def each(size: int) -> torch.Tensor:
    """Ends of runs of one row."""
    return torch.arange(1, size + 1, device="cpu")


def ends_at(*rows: int) -> torch.Tensor:
    """Ends as int64."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def filled(shape: Sequence[int], value: Any, dtype: torch.dtype | None) -> Runs:
    """A tensor of one value."""
    values = torch.full([min(n, 1) for n in shape], value, dtype=dtype, device="cpu")
    return Runs(values, [ends_at(n) if n else ends_at() for n in shape])


def elements(x: Runs) -> torch.Tensor:
    """All elements. Raises UnknownValueError where these are too many."""
    few(x.shape)
    values = x.values
    for dim, end in enumerate(x.ends):
        values = values.repeat_interleave(torch.diff(end, prepend=torch.zeros_like(end[:1])), dim)
    return values


def few(sizes: Sequence[int]) -> None:
    """Raise UnknownValueError where a tensor would have too many values."""
    if math.prod(sizes) > MAX_VALUES:
        raise UnknownValueError(f"{' x '.join(map(str, sizes))} values are too many")


def with_dim(x: Runs, dim: int, values: torch.Tensor, *ends: torch.Tensor) -> Runs:
    """Other values, with these ends in the place of one dimension's."""
    return Runs(values, [*x.ends[:dim], *ends, *x.ends[dim + 1 :]])


def coarse(values: torch.Tensor, ends: Sequence[torch.Tensor]) -> Runs:
    """Values with these ends, neighbouring runs of equal values put together."""
    out = list(ends)
    for dim, end in enumerate(ends):
        n = len(end)
        if n > 1:
            other = [d for d in range(values.dim()) if d != dim]
            change = values.narrow(dim, 1, n - 1) != values.narrow(dim, 0, n - 1)
            last = torch.cat([change.amax(other) if other else change, torch.ones(1, dtype=torch.bool, device="cpu")])
            if not last.all():
                values, out[dim] = values.index_select(dim, last.nonzero()[:, 0]), end[last]
    return Runs(values, out)


def fine(x: Runs, dim: int, ends: torch.Tensor) -> torch.Tensor:
    """Values with a dimension cut at other ends, among which its own are."""
    few([*x.values.shape[:dim], len(ends), *x.values.shape[dim + 1 :]])
    return x.values.index_select(dim, torch.searchsorted(x.ends[dim], ends))


def cut(x: Runs, dim: int, *rows: int) -> Runs:
    """The same, cut in front of some rows of a dimension, too."""
    cuts = ends_at(*(row for row in rows if 0 < row < x.shape[dim]))
    ends = torch.cat([x.ends[dim], cuts]).unique()
    return with_dim(x, dim, fine(x, dim, ends), ends)


def in_rows(x: Runs, dim: int) -> Runs:
    """The same with each row of a dimension a run."""
    ends = each(x.shape[dim])
    return with_dim(x, dim, fine(x, dim, ends), ends)


def aligned(operands: Sequence[Runs]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Values of tensors that are broadcast together, cut alike, and the ends of the result."""
    rank = max(x.dim() for x in operands)
    ends: list[torch.Tensor] = []
    for dim in range(-rank, 0):
        found = [x.ends[dim] for x in operands if x.dim() >= -dim and x.shape[dim] != 1]
        ends.append(torch.cat(found).unique() if found else ends_at(1))
    few([len(end) for end in ends])
    out = []
    for x in operands:
        values = x.values
        for dim in range(-x.dim(), 0):
            if x.shape[dim] != 1 and len(ends[dim]) != len(x.ends[dim]):
                values = values.index_select(dim, torch.searchsorted(x.ends[dim], ends[dim]))
        out.append(values)
    return out, ends
