"""dynamicrad::plan_of_positions: the plan table of the grid that a position table shows when the graph runs.

In regional compilation a graph with a symbolic number of tokens sees its grid only in the values of an input. For each
number of tokens a `Book` holds the grids met so far with their plans on the device. At a call the device compares the
table with them and takes the plan of the one that it shows, or dense attention; so no grid ever gets another's plan,
whatever the host knows, and in a captured CUDA graph too.

Pictures of one size, which a table shows as it does frames but for their times, run dense; references around the frames
are extra tokens, as text is (see `times`).

The host reads a table when a number of tokens is new, and when a table shows no grid of the book. On a GPU it learns of
the latter from a flag in its own memory, without waiting: such a grid runs dense until the flag has arrived, a few
layers of its first step. There a grid and its transpose are entered together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .layout import Range
from .op import QUERIES, TABLE, Table, dense_table, empty_table, full_table
from .packed import Packed, find_video, shows_video
from .positions import (
    Decoded,
    columns_of,
    decode_table,
    first_in_line,
    frames_in,
    may_be_pictures,
    shows,
)
from .table import PlanSpec

MAX_READS = 16
"""A book that has read so many tables reads no more: what it does not know runs dense."""


class _Pages(NamedTuple):
    """K grids; what `shows` takes; and the tensors of a `Table`, each [K + 1, ...]: the last is dense.

    Grids of all tokens of a table come before videos among others.
    """

    grids: tuple[Decoded | Packed, ...]
    columns: torch.Tensor
    lines: torch.Tensor
    plans: tuple[torch.Tensor, ...]

    def shown(self, table: torch.Tensor) -> torch.Tensor:
        """bool [K]: of which grids a table [tokens, columns] shows the frames."""
        whole = shows(table, self.columns, self.lines)
        frames = [frames_in(table, one.grid, *one.checked) for one in self.grids if isinstance(one, Decoded)]
        packed = [shows_video(table, *one[:4]) for one in self.grids if isinstance(one, Packed)]
        shown = [whole & torch.stack(frames)] if frames else []
        return torch.cat([*shown, torch.stack(packed)] if packed else [*shown, whole[:0]])


class Book:
    """The grids met so far in tables [tokens, columns] of one kind and device, and their plans.

    spec    how plans are made
    text    tokens of the sequence before and after the video
    device  of the plans
    queries (start, stop) of the tokens of the sequence that ask; None: all
    """

    def __init__(
        self,
        spec: PlanSpec,
        tokens: int,
        text: tuple[int, int],
        device: torch.device,
        table_device: torch.device,
        queries: Range | None = None,
    ):
        self.spec, self.tokens, self.text, self.device, self.table_device = spec, tokens, text, device, table_device
        self.queries = queries
        self.reads = 0
        self.pages = self._written(())
        self.missed: torch.Tensor | None = None
        if table_device.type == "cuda":
            with torch.inference_mode(False):
                self.missed = torch.zeros(1, dtype=torch.bool, device="cpu", pin_memory=True)

    def plan(self, table: torch.Tensor) -> Table:
        """Plan of the grid that a table [tokens, columns] shows."""
        if self.missed is None:
            at = self._place(table)
            if at is None and self._read(table):
                at = self._place(table)
            plans = [t[-1 if at is None else at].clone() for t in self.pages.plans]
        else:
            if not torch.cuda.is_current_stream_capturing() and (not self.reads or bool(self.missed)):
                self._read(table)
            pages = self.pages
            shown = pages.shown(table)
            if not torch.cuda.is_current_stream_capturing():
                self.missed.copy_(shown.any().logical_not(), non_blocking=True)
            chosen = torch.nn.functional.pad(shown, (0, 1), value=True).int().argmax()[None]
            plans = [t.index_select(0, chosen)[0] for t in pages.plans]
        return tuple(plans)

    def _place(self, table: torch.Tensor) -> int | None:
        shown = self.pages.shown(table)
        return int(shown.int().argmax()) if bool(shown.any()) else None

    def _read(self, table: torch.Tensor) -> bool:
        """Enter the grid that a table shows; False if it is in the book, or none, or the book is full."""
        if self.reads >= MAX_READS:
            return False
        self.reads += 1
        found = _frames_in(table.detach())
        if found is None or found in self.pages.grids:
            return False
        frames, height, width = found.grid
        transposed = [] if self.missed is None else [found._replace(grid=(frames, width, height))]
        self.pages = self._written(dict.fromkeys((*self.pages.grids, found, *transposed)))
        return True

    def _written(self, found: Iterable[Decoded | Packed]) -> _Pages:
        grids = tuple(sorted(found, key=lambda one: isinstance(one, Packed)))
        whole = [one for one in grids if isinstance(one, Decoded)]
        with torch.inference_mode(False):
            columns = torch.tensor([one.columns for one in whole], dtype=torch.int64, device="cpu")
            columns = columns.reshape(-1, 3).T.contiguous()
            lines = torch.empty(self.tokens, 3, len(whole), dtype=torch.int64, device="cpu")
            for k, one in enumerate(whole):
                lines[..., k] = first_in_line(one.grid)
            tables = [self._table(one) for one in grids]
            asked = None if self.queries is None else self.queries[1] - self.queries[0]
            tables.append(dense_table(self.spec, self.tokens + sum(self.text), asked))
            plans = [torch.stack(same).to(self.device) for same in zip(*tables, strict=True)]
        return _Pages(grids, columns.to(self.table_device), lines.to(self.table_device), tuple(plans))

    def _table(self, shown: Decoded | Packed) -> Table:
        before, after = (sum(pair) for pair in zip(self.text, shown.tokens_around, strict=True))
        return full_table(self.spec, shown.video, before, after, self.queries)


def _frames_in(table: torch.Tensor) -> Decoded | Packed | None:
    """The frames in a table [tokens, columns]; None where there are none, or they may be pictures."""
    found = decode_table(table, single_frame=True)
    if found is None:
        packed = find_video(table)
        return None if packed is None or packed.doubt else packed
    return None if found.around is None or may_be_pictures(found) else found


@functools.lru_cache(maxsize=32)
def _book(
    spec: str,
    tokens: int,
    columns: int,
    text: tuple[int, int],
    device: torch.device,
    table_device: torch.device,
    queries: Range | None,
) -> Book:
    return Book(PlanSpec.from_json(spec), tokens, text, device, table_device, queries)


@torch.library.custom_op(
    "dynamicrad::plan_of_positions",
    mutates_args=(),
    schema=f"(Tensor like, Tensor table, int dim, SymInt text_before, SymInt seq_len, str spec, {QUERIES}) -> {TABLE}",
)
def plan_of_positions_op(
    like: torch.Tensor,
    table: torch.Tensor,
    dim: int,
    text_before: int,
    seq_len: int,
    spec: str,
    q_start: int | None = None,
    q_len: int | None = None,
) -> Table:
    """The table of `spec` for the grid that a position table with its tokens along `dim` shows; see `op.Table`.

    The sequence of seq_len keys has text_before tokens in front of the video. Plans are on `like`'s device.
    q_start and q_len: the range of the keys that asks; None: all.
    """
    rows = columns_of(table, dim)
    tokens, columns = rows.shape
    text = (text_before, seq_len - text_before - tokens)
    queries = None if q_start is None or q_len is None else (q_start, q_start + q_len)
    return _book(spec, tokens, columns, text, like.device, table.device, queries).plan(rows)


@plan_of_positions_op.register_fake
def _(
    like: torch.Tensor,
    table: torch.Tensor,
    dim: int,
    text_before: int,
    seq_len: int,
    spec: str,
    q_start: int | None = None,
    q_len: int | None = None,
) -> Table:
    return empty_table(PlanSpec.from_json(spec), seq_len, like, None if q_start is None else q_len)
