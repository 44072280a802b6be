"""Covariances of dropped blocks on the CPU: what `moments_op` adds to the sums over mean keys (`means_cpu`).

With E_J the sum of dk v' over the keys of block J (that of dk dv' too, as dk adds up to nothing) and n_J their number,

    A_I = sum_J w_IJ E_J / n_J        R_I = sum_J w_IJ (sum of dk^2) / n_J

some columns of keys at a time: their deviations and E_J stay in the scratch memory of a worker, one GEMM weighs them,
and only A and R are held until the rows are done. Then sums o and s of a query over its means become

    u = scale^2 / 2 sum_d q_d^2 R_d        o (1 + u) + s scale q A        s (1 + u)
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import workers
from .attention_arguments import Attention
from .means_cpu import BlockMeans
from .softmax_cpu import LOG2_E, Sums
from .workers import Buffers, Task

SLICE_BYTES = 1 << 20  # deviations and E of some columns, of one worker
LEAST_COLUMNS = 16  # of keys at a time


def bytes_of_a_head(a: Attention) -> int:
    """A and R of the query heads of one key/value head, in fp32; the arguments may be of any number of samples."""
    dim, rows = a.k.shape[3], a.kv_counts.shape[2] * (a.q.shape[1] // a.k.shape[1])
    return 4 * rows * dim * (dim + 1)


class BlockMoments:
    """A and R of the rows of some heads of one sample, scaled to fit queries that hold scale * log2(e)."""

    def __init__(self, means: BlockMeans, queries: Tensor, heads: int, buffers: Buffers) -> None:
        """queries: fp32 [heads * Mq, block_q, D], zeros at the end. `weigh` and then `fill` compute what is held."""
        self.means, self.queries, self.heads = means, queries, heads
        self.rows, self.dim = queries.shape[0] // heads, queries.shape[2]
        self.weights = buffers.get("moment_weights", heads, self.rows, means.n_kv)  # w_IJ / n_J
        self.products = buffers.get("moment_products", heads * self.rows, self.dim, self.dim)  # A
        self.squares = buffers.get("moment_squares", heads * self.rows, self.dim)  # R

    def weigh(self, counts: Tensor, indices: Tensor, q_len: int, scale: float) -> list[Task]:
        """Tasks that compute the weights, after the means; counts [h, Mq] and indices [h, Mq, W], h 1 or `heads`."""
        block, n_kv = self.queries.shape[1], self.means.n_kv
        tokens = torch.full((self.rows, 1), block, dtype=torch.float32, device="cpu")
        tokens[-1] = q_len - (self.rows - 1) * block
        rep = self.heads // self.means.heads
        # A task for each worker: what the caller would do alone, all cores would share, and wait for one another.
        size = max(1, self.rows * self.heads // (2 * workers.count()))

        def weigh(h: int, start: int) -> Task:
            rows = slice(start, min(start + size, self.rows))

            def task(_: Buffers) -> None:
                plan = h if counts.shape[0] > 1 else 0
                weights, bias = self.weights[h, rows], self.means.row_bias(counts[plan, rows], indices[plan, rows])
                if bias is None:
                    weights.zero_()
                    return
                first = h * self.rows
                mean = self.queries[first + start : first + rows.stop].sum(1).mul_(scale).div_(tokens[rows])
                scores = torch.addmm(bias[:, :n_kv].div_(LOG2_E), mean, self.means.keys[h // rep, :n_kv].t())
                share = scores.softmax(-1).nan_to_num_(0.0)  # NaN in a row that drops nothing
                torch.div(share, self.means.counts[:, 0], out=weights)

            return task

        return [weigh(h, start) for h in range(self.heads) for start in range(0, self.rows, size)]

    def fill(self, keys: Tensor, values: Tensor, usable: Tensor | None) -> list[Task]:
        """Tasks that compute A and R, after the weights.

        keys and values fp32 [hkv * Mk, block, D]; usable bool [Mk, block], None for all.
        """
        (block, dim), n_kv, groups = keys.shape[1:], self.means.n_kv, self.means.heads
        columns = min(-(-dim * groups // workers.count()), SLICE_BYTES // (4 * n_kv * (block + dim)))
        columns = max(LEAST_COLUMNS, columns)

        def fill(g: int, start: int) -> Task:
            own, blocks = slice(start, min(start + columns, dim)), slice(g * n_kv, (g + 1) * n_kv)
            rep = self.heads // groups
            rows = slice(g * rep * self.rows, (g + 1) * rep * self.rows)

            def task(buffers: Buffers) -> None:
                weights = self.weights.view(-1, n_kv)[rows]
                apart = buffers.get("apart", n_kv, block, own.stop - start)
                torch.sub(keys[blocks, :, own], self.means.exact[g, :, None, own], out=apart)
                if usable is not None:
                    apart.masked_fill_(~usable[..., None], 0.0)
                both = buffers.get("both", n_kv, own.stop - start, dim)
                torch.bmm(apart.transpose(1, 2), values[blocks], out=both)
                _weigh(weights, both.flatten(1), 1.0 / LOG2_E, self.products[rows, own].flatten(1))
                _weigh(weights, apart.square_().sum(1), 0.5 / LOG2_E**2, self.squares[rows, own])

            return task

        return [fill(g, start) for g in range(groups) for start in range(0, dim, columns)]

    def correct(self, q: Tensor, sums: Sums, own: Tensor, buffers: Buffers) -> None:
        """Correct the sums over means of the rows own [G], ascending; q [G, block_q, D] are their scaled queries."""
        first, last = int(own[0]), int(own[-1])
        some: Tensor | slice = slice(first, last + 1) if last - first + 1 == own.numel() else own
        scaled = torch.mul(q, q, out=buffers.get("moment_q", *q.shape))
        growth = scaled.mul_(self.squares[some][:, None]).sum(-1).add_(1.0)  # 1 + u
        torch.mul(q, sums.total[..., None], out=scaled)
        torch.baddbmm(sums.out.mul_(growth[..., None]), scaled, self.products[some], out=sums.out)
        sums.total.mul_(growth)


def _weigh(weights: Tensor, blocks: Tensor, factor: float, out: Tensor) -> None:
    """out [rows, n] = factor * weights [rows, Mk] @ blocks [Mk, n]; out may be columns of a wider tensor."""
    torch.addmm(out, weights, blocks, beta=0, alpha=factor, out=out)
