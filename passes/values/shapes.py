"""What operators that move, repeat, cut and join do to tensors of runs. Arguments are those of the ATen operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .runs import Runs, coarse, cut, each, ends_at, few, filled, fine, in_rows, with_dim


def same(x: Runs, *args: Any, **kwargs: Any) -> Runs:
    """The same values."""
    return Runs(x.values, x.ends)


def view(x: Runs, shape: Sequence[int]) -> Runs:
    """Other dimensions for the same elements: groups of dimensions that hold as many are put together and cut."""
    shape = list(shape)
    if -1 in shape:
        shape[shape.index(-1)] = x.numel() // max(math.prod(n for n in shape if n != -1), 1)
    if 0 in shape:
        return filled(shape, 0, x.dtype)
    old, new, at = list(x.shape), list(shape), 0
    while old or new:
        first, second = ([old.pop(0)] if old else []), ([new.pop(0)] if new else [])
        while math.prod(first) != math.prod(second):
            shorter, rest = (first, old) if math.prod(first) < math.prod(second) else (second, new)
            shorter.append(rest.pop(0))
        for dim in reversed(range(at, at + len(first) - 1)):
            x = _merged(x, dim)
        x = x if first else unsqueeze(x, at)
        for n in reversed(second[1:]):
            x = _divided(x, at, n)
        x = x if second else select(x, at, 0)
        at += len(second)
    return x


def _merged(x: Runs, dim: int) -> Runs:
    """One dimension in the place of `dim` and the next."""
    inner = x.shape[dim + 1]
    if len(x.ends[dim + 1]) == 1:
        ends = x.ends[dim] * inner
    else:
        x = in_rows(x, dim)
        ends = ((x.ends[dim] - 1)[:, None] * inner + x.ends[dim + 1]).flatten()
    return coarse(x.values.flatten(dim, dim + 1), [*x.ends[:dim], ends, *x.ends[dim + 2 :]])


def _divided(x: Runs, dim: int, inner: int) -> Runs:
    """Two dimensions in the place of one, the second of `inner` rows."""
    if (x.ends[dim] % inner).any():
        x = in_rows(x, dim)
        values = x.values.unflatten(dim, (-1, inner))
        ends = [each(n) for n in values.shape[dim : dim + 2]]
    else:
        values, ends = x.values.unsqueeze(dim + 1), [x.ends[dim] // inner, ends_at(inner)]
    return coarse(values, [*x.ends[:dim], *ends, *x.ends[dim + 1 :]])


def expand(x: Runs, shape: Sequence[int], **kwargs: Any) -> Runs:
    """Dimensions of size 1 repeated, and new ones in front."""
    for _ in range(len(shape) - x.dim()):
        x = unsqueeze(x, 0)
    pairs = zip(shape, x.shape, x.ends, strict=True)
    return Runs(x.values, [end if n in (-1, old) else ends_at(n) for n, old, end in pairs])


def repeat(x: Runs, times: Sequence[int]) -> Runs:
    """Each dimension several times."""
    for _ in range(len(times) - x.dim()):
        x = unsqueeze(x, 0)
    for dim, n in enumerate(times):
        if n and len(x.ends[dim]) == 1:
            x = with_dim(x, dim, x.values, x.ends[dim] * n)
        elif n != 1:
            x = cat([x] * n, dim) if n else slice_(x, dim, 0, 0)
    return x


def permute(x: Runs, order: Sequence[int]) -> Runs:
    """Dimensions in another order."""
    return Runs(x.values.permute(*order), [x.ends[d] for d in order])


def transpose(x: Runs, one: int, other: int) -> Runs:
    """Two dimensions in each other's place."""
    order = list(range(x.dim()))
    order[one], order[other] = order[other], order[one]
    return permute(x, order)


def t(x: Runs) -> Runs:
    """A matrix, or less, the other way round."""
    return permute(x, range(x.dim())[::-1])


def unsqueeze(x: Runs, dim: int) -> Runs:
    """A dimension of size 1 more."""
    dim %= x.dim() + 1
    return Runs(x.values.unsqueeze(dim), [*x.ends[:dim], ends_at(1), *x.ends[dim:]])


def squeeze(x: Runs, dims: int | Sequence[int] | None = None) -> Runs:
    """Some or all dimensions of size 1 less."""
    given = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    for dim in sorted({d % x.dim() for d in given if x.dim()}, reverse=True):
        x = select(x, dim, 0) if x.shape[dim] == 1 else x
    return x


def slice_(x: Runs, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Runs:
    """Some rows of a dimension."""
    dim %= x.dim()
    low, high = bounds(x.shape[dim], start, stop)
    if step != 1:
        x = in_rows(x, dim)
        values = x.values.index_select(dim, ends_at(*range(low, high, step)))
        return coarse(values, [*x.ends[:dim], each(values.shape[dim]), *x.ends[dim + 1 :]])
    x = cut(x, dim, low, high)
    end = x.ends[dim]
    kept = ((end > low) & (end <= high)).nonzero()[:, 0]
    return with_dim(x, dim, x.values.index_select(dim, kept), end[kept] - low)


def bounds(size: int, start: int | None = None, stop: int | None = None) -> tuple[int, int]:
    """First and last but one row of a slice."""
    low, high, _ = slice(start, stop).indices(size)
    return low, max(low, high)


def select(x: Runs, dim: int, at: int) -> Runs:
    """One row of a dimension."""
    dim %= x.dim()
    run = int(torch.searchsorted(x.ends[dim], at % x.shape[dim] + 1))
    return coarse(x.values.select(dim, run), [*x.ends[:dim], *x.ends[dim + 1 :]])


def cat(tensors: Sequence[Runs], dim: int = 0) -> Runs:
    """One behind the other."""
    given = [x for x in tensors if x.shape != (0,)] or list(tensors[:1])  # such empty ones may have any rank
    dim %= given[0].dim()
    ends = [torch.cat([x.ends[d] for x in given]).unique() for d in range(given[0].dim())]
    pieces, rows, offset = [], [], 0
    for x in given:
        for d, end in enumerate(ends):
            x = x if d == dim else with_dim(x, d, fine(x, d, end), end)
        pieces.append(x.values)
        rows.append(x.ends[dim] + offset)
        offset += x.shape[dim]
    few([*(len(end) for d, end in enumerate(ends) if d != dim), sum(map(len, rows))])
    return coarse(torch.cat(pieces, dim), [*ends[:dim], torch.cat(rows), *ends[dim + 1 :]])


def stack(tensors: Sequence[Runs], dim: int = 0) -> Runs:
    """One behind the other in a dimension of their own."""
    return cat([unsqueeze(x, dim) for x in tensors], dim)


def pad(x: Runs, sizes: Sequence[int], value: Any = 0) -> Runs:
    """More rows in front of and behind the last dimensions, of one value; fewer where a size is negative."""
    for i in range(len(sizes) // 2):
        dim, (front, behind) = x.dim() - 1 - i, sizes[2 * i : 2 * i + 2]
        x = slice_(x, dim, max(-front, 0), x.shape[dim] - max(-behind, 0))
        for n, order in ((front, slice(None)), (behind, slice(None, None, -1))):
            if n > 0:
                shape = [*x.shape[:dim], n, *x.shape[dim + 1 :]]
                x = cat([filled(shape, value, x.dtype), x][order], dim)
    return x
