"""What is computed of dense attention, and what it costs that something stands for dropped blocks.

A row of queries that drops blocks and compensates reads one mean key for each block: 1 / block_kv of a dense row.
Covariances (`kernels.moments_op`) add products with D x D matrices on top: of each key block, of each row, and of each
row with its queries. All are shares of dense attention.
"""

from __future__ import annotations

from torch import Tensor


def mean_keys(block_kv: int, compensate: float = 1.0) -> float:
    """Share of a dense row that its mean keys cost where it drops blocks; nothing without compensation."""
    return 1.0 / block_kv if compensate else 0.0


SELECTION = 0.01
"""Share of dense attention that choosing blocks takes, in time: measured 0.4 to 0.8 % at 16k tokens on two CPU cores
(benchmarks/select_time.py), and by arithmetic 0.4 % on a GPU (`kernels.select_op`)."""


def covariances(head_dim: int, kv_len: int, block_q: int, block_kv: int, q_len: int | None = None) -> float:
    """Share of the products of dense attention that covariances add to those of compensation.

    They are products of the keys, of the rows and of the queries with D x D matrices. q_len None: as many as keys.
    """
    each = head_dim / 2
    return each / (q_len or kv_len) + each / (block_q * block_kv) + each / kv_len


def blocks_to_skip(sparsity: float, block_kv: int, compensate: float) -> float:
    """Share of the blocks to skip so that `sparsity` of dense attention is: the blocks pay for the mean keys.

    None is skipped at sparsity 0, where nothing has to stand for anything.
    """
    return min(1.0, sparsity + mean_keys(block_kv, compensate)) if sparsity else 0.0


def computed(kept: Tensor, compensate: Tensor | float | None, blocks: int, block_kv: int) -> Tensor:
    """Share of dense attention that is computed, fp64 [], the mean over all rows; on the device of `kept`.

    kept        int [...]: blocks that each row keeps
    compensate  weight of the mean keys of dropped blocks, one or broadcast to `kept`; None = 0
    blocks      key blocks of a dense row, of block_kv tokens each
    """
    share = kept.double().mean() / blocks
    if compensate is None:
        return share
    return share + ((kept < blocks) & (compensate > 0)).double().mean() / block_kv
