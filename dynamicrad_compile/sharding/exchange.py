"""Rows of a sequence among processes: cut, exchanged for heads, gathered.

Each process holds a shard of the S rows, as `tensor_split` cuts them: the first S % n processes have one more. Every
exchange is an all-to-all of torch.distributed's functional collectives, which torch.compile traces and autograd
differentiates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from ..errors import ShardError


@dataclass
class Shards:
    """The shards of a sequence of `size` rows, among the processes of a group."""

    group: dist.ProcessGroup
    rank: int
    world: int
    size: int = 0

    @property
    def lengths(self) -> list[int]:
        """Rows of each process."""
        return [(self.size + self.world - 1 - rank) // self.world for rank in range(self.world)]

    @property
    def local(self) -> int:
        """Rows of this process."""
        return self.lengths[self.rank]

    @property
    def start(self) -> int:
        """The first row of this process."""
        return sum(self.lengths[: self.rank])

    @property
    def equal(self) -> bool:
        """Whether all processes have as many rows."""
        return self.size % self.world == 0

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S, C] -> [B, rows of this process, C]; S is the sequence's size from now on.

        Raises ShardError where a process would have no row.
        """
        if tokens.shape[1] < self.world:
            raise ShardError(f"{tokens.shape[1]} video tokens can't be sharded over {self.world} processes")
        self.size = tokens.shape[1]
        return self.cut(tokens, 1)

    def cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's rows of a dimension of `size`. Raises ShardError where it is of another."""
        if x.shape[dim] != self.size:
            raise ShardError(f"a table has {x.shape[dim]} rows for {self.size} video tokens; expected one a token")
        pieces = x.chunk(self.world, dim) if self.equal else x.tensor_split(self.world, dim)
        return pieces[self.rank]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[B, rows of this process, C] -> [B, S, C]."""
        sent = x.transpose(0, 1).expand(self.world, -1, -1, -1).flatten(0, 1)
        return self._exchange(sent, self.lengths, [self.local] * self.world).transpose(0, 1)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, T, D] -> [B, H / n, T, D]: this process's heads."""
        return x.chunk(self.world, 1)[self.rank]

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H / n, T, D] -> [B, H, T, D]."""
        sent = x.transpose(0, 1).expand(self.world, -1, -1, -1, -1).flatten(0, 1)
        each = [x.shape[1]] * self.world
        return self._exchange(sent, each, each).transpose(0, 1)

    def heads_for_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, rows of this process, D] -> [B, H / n, S, D]: Ulysses' first exchange (arXiv:2309.14509)."""
        sent = x.unflatten(1, (self.world, -1)).permute(1, 3, 0, 2, 4)  # [n, rows, B, H / n, D]
        if self.equal:
            heard = self._exchange(sent, [1] * self.world, [1] * self.world).flatten(0, 1)
        else:
            heard = self._exchange(sent.flatten(0, 1), self.lengths, [self.local] * self.world)
        return heard.permute(1, 2, 0, 3)

    def rows_for_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H / n, S, D] -> [B, H, rows of this process, D]: the inverse of `heads_for_rows`."""
        sent = x.permute(2, 0, 1, 3)  # [S, B, H / n, D]
        if self.equal:
            sent = sent.unflatten(0, (self.world, -1))
            heard = self._exchange(sent, [1] * self.world, [1] * self.world)
        else:
            heard = self._exchange(sent, [self.local] * self.world, self.lengths).unflatten(0, (self.world, -1))
        return heard.permute(2, 0, 3, 1, 4).flatten(1, 2)

    def _exchange(self, x: torch.Tensor, heard: list[int], sent: list[int]) -> torch.Tensor:
        """`sent[r]` rows of the first dimension go to process r, and `heard[r]` come from it."""
        out = functional.all_to_all_single_autograd(x.contiguous(), heard, sent, self.group)
        return out.wait() if isinstance(out, functional.AsyncCollectiveTensor) else out
