"""Nevergrad behind two calls, ask and tell, on points of the unit cube."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from ..errors import OptionsError, nearest
from ..optional import optional

Point = list[float]
# Told for a pruned point: worse than any loss that a constraint leaves.
PRUNED = 1e5
# First step of the optimizers that mutate, in the unit cube.
SIGMA = 0.3


class Optimizer:
    """One optimizer of Nevergrad's registry. Deterministic for a seed, the told values and Nevergrad's version.

    Raises DynamicRadError without nevergrad, OptionsError for a name that it does not have.
    """

    def __init__(self, name: str, dimensions: int, budget: int, seed: int, batch: int, known: list[Point]) -> None:
        ng = optional("nevergrad", "tuning needs", "tune")
        registry = ng.optimizers.registry
        if name not in registry:
            known_names = sorted(registry)
            raise OptionsError(
                f"no optimizer is called {name!r}.{nearest(name, known_names)} "
                "`nevergrad.optimizers.registry` lists all of them."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cube = ng.p.Array(init=np.full(dimensions, 0.5)).set_bounds(0.0, 1.0)
            cube.set_mutation(sigma=SIGMA)
            cube.random_state = np.random.RandomState(seed)
            self._optimizer = registry[name](cube, budget=budget, num_workers=batch)
            for point in known:
                self._optimizer.suggest(np.array(point))

    def ask(self) -> tuple[Any, Point]:
        """A candidate for `tell`, and its point."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            candidate = self._optimizer.ask()
        return candidate, [float(u) for u in candidate.value]

    def tell(self, candidate: Any, loss: float) -> None:
        """Report a loss; infinite for a pruned point. The optimizer sees its logarithm: losses span decades."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._optimizer.tell(candidate, math.log(min(loss, PRUNED) + 1e-9))
