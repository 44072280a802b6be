"""Stages of a run: which of a regime's plans a denoising step reads.

A schedule of sparsity has a plan for each of its stages; a pattern whose blocks rotate has one for each step of its
cycle. The plan is chosen on the device, by the step clock (`runtime.clock`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

By = Literal["step", "timestep"]
Schedule = tuple[tuple[float, float], ...]
"""(start, sparsity) of each stage, in order."""


@dataclass(frozen=True)
class Stages:
    """Which plan of `number` a step reads.

    starts   where all stages but the first begin, in the order of a run; none: step n reads plan n mod `number`
    by       what starts are: numbers of steps from 0, or timesteps in the model's own units
    falling  timesteps fall while the model denoises
    """

    number: int = 1
    starts: tuple[float, ...] = ()
    by: By = "step"
    falling: bool = False

    @property
    def is_cycle(self) -> bool:
        """Whether plans follow each other in turn."""
        return self.number > 1 and not self.starts


ONE_STAGE = Stages()
"""Every step reads the same plan."""


def stages_of(starts: Sequence[float], by: By, steps: int) -> tuple[Stages, tuple[float, ...]]:
    """Stages that begin at these shares of `steps` denoising steps, or at these timesteps; and how many steps each has.

    Of timesteps that is not known: all count the same.
    """
    if by == "timestep":
        number = len(starts)
        return Stages(number, tuple(starts[1:]), by, number > 1 and starts[1] < starts[0]), (1.0,) * number
    first = [math.ceil(start * steps - 1e-9) for start in starts]
    lengths = [max(0, end - begin) for begin, end in zip(first, [*first[1:], steps], strict=True)]
    return Stages(len(starts), tuple(map(float, first[1:]))), tuple(map(float, lengths))
