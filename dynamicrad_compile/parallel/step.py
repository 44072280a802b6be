"""A step of a model on one device, on paper: attention by the crossover table, all other products by their FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plans.crossover import Gain, expected_gain
from .attentions import Attention
from .chips import Chip


@dataclass(frozen=True)
class Step:
    """A step on one device, in ms.

    each_ms  of one of each kind of attention, as it is; rest_ms: of all but attention
    gains    what the table expects of each kind that is sparse, each once
    """

    attentions: Sequence[Attention]
    each_ms: Sequence[float]
    rest_ms: float
    dense_ms: float
    sparse_ms: float
    gains: Sequence[Gain]

    @property
    def source(self) -> str:
        """Where the speed-ups are from, in words."""
        lines = [
            f"sparse attention by {one.source} figures for {one.arch} ({one.machine}, {one.date})" for one in self.gains
        ]
        return "; ".join(dict.fromkeys(lines)) or "no attention is sparse"


def on_one(
    attentions: Sequence[Attention], target: Chip, rest_flops: float, half: bool = True, least: float = 0.0
) -> Step:
    """The step on one device.

    rest_flops  FLOPs outside of attention
    half        16-bit numbers; where the table has only others, these
    least       sparse attention that is expected to gain less stays dense there
    Raises CrossoverError if the table can't be read.
    """
    rest = rest_flops / target.matmul_rate * 1e3
    dense, sparse, each, gains = rest, rest, [], []
    for one in attentions:
        ms = one.dense_flops / target.attention_rate(one.head_dim) * 1e3
        dense += one.count * ms
        if one.replaced:
            gain = expected_gain(target.arch, one.kv_len, one.sparsity, one.head_dim, half)
            assert gain is not None  # each chip here has a table
            gains.append(gain)
            ms /= gain.ratio if gain.ratio >= least else 1.0
        each.append(ms)
        sparse += one.count * ms
    return Step(attentions, each, rest, dense, sparse, gains)
