"""Attention of some query rows over several sets of keys, one set after the other, on the CPU.

With base-2 scores S = Q K^T (+ bias), where Q already holds the factor scale * log2(e), and a shift m per query,

    total += rowsum(2^(S - m))      out += 2^(S - m) V

and at the end out / total and lse = ln(2) (log2(total) + m).

Any shift gives the same result as long as nothing over- or underflows. By Cauchy-Schwarz |S| <= |q| max|k|; where
that is at most LIMIT the shift is 0, which saves two passes over the scores and every merge ("plain"). Otherwise the
shift is the largest score so far, as in an online softmax. Powers of 2 because `exp2` takes half the time of `exp`
or `softmax` (0.53 and 1.0 ns an element, AVX2). Sums are in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .workers import Buffers, Task

LOG2_E = math.log2(math.e)
LIMIT = 40 * LOG2_E  # base-2 scores up to here need no shift: e^40 times 2^24 keys is far from the largest fp32
BIAS_LIMIT = 20 * LOG2_E  # the same for the bias of mean keys
VALUE_RANGE = (1e-10, 1e10)  # largest |v| for which the products with e^-40 to e^40 are harmless
LOWEST = torch.finfo(torch.float32).min


def key_norms(keys: Tensor, values: Tensor, norms: Tensor) -> list[Task]:
    """Tasks that fill norms [h] with the longest of the keys [h, S, D], inf where `values` forbid a plain softmax."""

    def norm(h: int) -> Task:
        def task(_: Buffers) -> None:
            low, high = values[h].aminmax()
            size = torch.maximum(-low, high)
            fine = (size == 0) | ((size >= VALUE_RANGE[0]) & (size <= VALUE_RANGE[1]))
            longest = torch.linalg.vector_norm(keys[h], dim=-1).amax()
            norms[h] = torch.where(fine, longest, float("inf"))

        return task

    return [norm(h) for h in range(norms.numel())]


def is_plain(queries: Tensor, norms: Tensor) -> bool:
    """Whether scaled queries [G, M, D] need no shift with keys no longer than norms [G]. False for NaN or inf."""
    longest = torch.linalg.vector_norm(queries, dim=-1).amax(-1)
    return bool((longest * norms <= LIMIT).all())


class Sums:
    """Running sums of queries [G, M, D]: out [G, M, D], total [G, M] and, unless plain, the shift top [G, M]."""

    def __init__(self, out: Tensor, total: Tensor, top: Tensor | None) -> None:
        self.out, self.total, self.top = out, total, top

    @classmethod
    def zeros(cls, shape: torch.Size, plain: bool, buffers: Buffers) -> Sums:
        """Of no keys yet, for queries of this shape, in scratch memory."""
        top = None if plain else buffers.get("top", *shape[:-1]).fill_(LOWEST)
        return cls(buffers.get("o", *shape).zero_(), buffers.get("total", *shape[:-1]).zero_(), top)

    def part(self, start: int, stop: int) -> Sums:
        """A view of some of the G rows."""
        top = None if self.top is None else self.top[start:stop]
        return Sums(self.out[start:stop], self.total[start:stop], top)

    def flat(self) -> Sums:
        """A view with all queries in one row: [1, G * M, D]."""
        top = None if self.top is None else self.top.view(1, -1)
        return Sums(self.out.view(1, -1, self.out.shape[-1]), self.total.view(1, -1), top)

    def add(
        self, q: Tensor, k: Tensor, v: Tensor, usable: Tensor | None, bias: Tensor | None, buffers: Buffers
    ) -> None:
        """Add keys and values [G, N, D] for scaled q [G, M, D].

        usable bool [G, n] speaks of the last n keys, None of none. bias [R, N] in base 2 is for R equal parts of the
        queries of the only row (G = 1); it may be -inf.
        """
        scores = buffers.get("s", *q.shape[:2], k.shape[1])
        torch.bmm(q, k.transpose(1, 2), out=scores)
        if bias is not None:
            scores.view(bias.shape[0], -1, bias.shape[1]).add_(bias[:, None])
        if usable is not None:
            scores[..., scores.shape[-1] - usable.shape[-1] :].masked_fill_(~usable[:, None], float("-inf"))
        if self.top is not None:
            top = torch.maximum(self.top, scores.amax(-1))
            decay = (self.top - top).exp2_()
            self.top.copy_(top)
            self.total.mul_(decay)
            self.out.mul_(decay[..., None])
            scores.sub_(top[..., None])
        scores.exp2_()
        self.total.add_(scores.sum(-1))
        torch.baddbmm(self.out, scores, v, out=self.out)

    def finish(self) -> tuple[Tensor, Tensor]:
        """out and lse; zeros and -inf for a query without a key."""
        lse = self.total.log2()
        if self.top is not None:
            lse.add_(self.top)
        # A total is 0 or at least 2^-(LIMIT + BIAS_LIMIT).
        return self.out.div_(self.total.clamp(min=2.0**-120)[..., None]), lse.div_(LOG2_E)
