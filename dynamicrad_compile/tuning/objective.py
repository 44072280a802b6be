"""The objective: error of a mode's parameters on draws of the proxies, at the sparsity that would be executed.

Blocks are those of the point's order of tokens, and what stands for dropped blocks is what the ops compute. Sparsity
counts mean keys but, as everywhere, not the products of covariances: the target is raised by these, so that a point
with covariances has to drop more, about as much as they cost.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PlanError
from ..plans.cost import computed, covariances, mean_keys
from ..plans.layout import Layout
from ..plans.make import make_candidates, make_plan
from .boxes import Shape
from .captures import load_capture
from .choosing import Choice, fit_thresholds
from .proxy import PROXIES
from .sums import BlockSums, Exponentials, fewer_channels, sample_rows
from .task import CHANNELS, HELD_OUT_SEEDS, Task

ERROR_WEIGHT = 1000.0
SPARSITY_WEIGHT = 10000.0
# Thresholds are set for this much more sparsity than asked, because other content selects a little more.
MARGIN = 0.0005
# What of dynamic_threshold's parameters is the choice's and not the candidates'.
CHOSEN_BY = ("criterion", "rank", "near", "far")

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What one point gave.

    parameters  as in the profile's table of the mode
    status      "ok", or "pruned" for a point that the planner refuses or that gives no finite error
    reason      why it was pruned
    error       mean squared error over the variance of dense attention; mean over the draws
    sparsity    share of dense attention that is skipped, compensation counted; mean over the draws
    loss        1000 * error + 10000 * max(0, target - sparsity), the published search's; the target with `extra`
    draws       [proxy, seed, error, sparsity] each; of "captured" the number of the capture for a seed
    seconds     it took
    """

    parameters: Parameters
    status: str
    reason: str = ""
    error: float = math.inf
    sparsity: float = 0.0
    loss: float = math.inf
    draws: tuple[tuple[str, int, float, float], ...] = ()
    seconds: float = 0.0


def extra(task: Task, parameters: Parameters) -> float:
    """Share of dense attention that the covariances of a point cost; what it has to skip beyond the target."""
    if not (parameters.get("covariance") and parameters["compensate"]):
        return 0.0
    return covariances(task.head_dim, task.tokens, task.block_size, task.block_size)


class Objective:
    """Evaluates parameters for one regime of motion. Building it computes the block sums of all draws.

    With `held_out` on the draws and captures that no search sees, if there are any (`Task.holds_out`).
    """

    def __init__(self, task: Task, regime: str, held_out: bool = False) -> None:
        self.task = task
        self.regime = regime
        seeds = HELD_OUT_SEEDS[: len(task.seeds)] if held_out else task.seeds
        drawn = {proxy: seeds for proxy in task.proxies if proxy != "captured"}
        if "captured" in task.proxies:
            drawn["captured"] = tuple(number for number, _ in task.captures_of(regime, held_out))
        self.names = [(proxy, seed) for proxy, seeds in drawn.items() for seed in seeds]
        self.sums = [self._draw(proxy, seed) for proxy, seed in self.names]

    def _draw(self, proxy: str, seed: int) -> dict[str, BlockSums]:
        """The sums of one draw, one for each shape of blocks that is searched."""
        task = self.task
        if proxy == "captured":
            q, k, v = load_capture(task.captures[seed])
        else:
            text = (task.text_before, task.text_after)
            q, k, v = PROXIES[proxy](task.grid, self.regime, task.proxy_heads(proxy), task.head_dim, seed, *text)
        v = fewer_channels(v, CHANNELS, seed)
        attention = Exponentials(q, k, sample_rows(task.tokens, task.sampled_rows(proxy), seed))
        found = {}
        for box in task.boxes:
            sums = BlockSums(q, k, v, task.block_size, attention, self._order(box))
            if proxy == "captured":
                sums.equalise()  # the sizes of a model's heads differ by far
            found[repr(box)] = sums
        return found

    def _order(self, box: Shape) -> torch.Tensor | None:
        if isinstance(box, str):
            return None
        task, (frames, height, width) = self.task, box
        layout = Layout(task.grid, task.block_size, task.text_before, task.text_after, (frames, height, width))
        order = layout.order()
        return None if order is None else torch.from_numpy(order)

    def _sums(self, parameters: Parameters) -> list[BlockSums]:
        """The sums of all draws in a point's order of tokens. Raises PlanError for boxes that are not searched."""
        box = repr(parameters.get("box", "raster"))
        if box not in self.sums[0]:
            raise PlanError(f"box must be among those searched, {', '.join(self.sums[0])}, got {box}.")
        return [draw[box] for draw in self.sums]

    def evaluate(self, mode: str, parameters: Parameters, balance: float | None = None) -> Evaluation:
        """Evaluate one point; with `balance`, near and far are first set so that the target sparsity is met.

        A point that the planner refuses (PlanError), and one whose error is not finite, is pruned and says why.
        Any other error is a defect and is raised.
        """
        start = time.perf_counter()
        try:
            all_sums = self._sums(parameters)
            masks, parameters = self._masks(mode, parameters, balance, all_sums)
        except PlanError as problem:
            return Evaluation(parameters, "pruned", str(problem), seconds=time.perf_counter() - start)
        draws = []
        for (proxy, seed), sums, mask in zip(self.names, all_sums, masks, strict=True):
            error = sums.error(mask, parameters["compensate"], parameters.get("covariance", False))
            draws.append((proxy, seed, error, self._sparsity(mask, parameters["compensate"])))
        error = sum(draw[2] for draw in draws) / len(draws)
        sparsity = sum(draw[3] for draw in draws) / len(draws)
        seconds = time.perf_counter() - start
        if not math.isfinite(error):
            return Evaluation(parameters, "pruned", f"the error is {error}", draws=tuple(draws), seconds=seconds)
        target = self.task.sparsity + extra(self.task, parameters)
        loss = ERROR_WEIGHT * error + SPARSITY_WEIGHT * max(0.0, target - sparsity)
        return Evaluation(parameters, "ok", "", error, sparsity, loss, tuple(draws), seconds)

    def _masks(
        self, mode: str, parameters: Parameters, balance: float | None, all_sums: list[BlockSums]
    ) -> tuple[list[torch.Tensor], Parameters]:
        task = self.task
        where = (task.grid, task.block_size, task.text_before, task.text_after)
        if mode == "static_ratio":
            mask = make_plan("dynamicrad", *where, **parameters).block_mask()[0]
            return [mask] * len(all_sums), parameters
        prior = {name: value for name, value in parameters.items() if name not in CHOSEN_BY}
        candidates = make_candidates(*where, **prior)
        by = (parameters["criterion"], parameters.get("rank", "mass"))
        choices = [Choice(sums, candidates, *by) for sums in all_sums]
        if balance is not None:
            paid = mean_keys(task.block_size, parameters["compensate"]) + extra(task, parameters)
            near, far = fit_thresholds(choices, 1.0 - task.sparsity - paid - MARGIN, balance)
            parameters = {**parameters, "near": near, "far": far}
        return [choice.mask(parameters["near"], parameters["far"]) for choice in choices], parameters

    def _sparsity(self, mask: torch.Tensor, compensate: float) -> float:
        """Share of dense attention that the mask [H', Mq, Mk] skips; a compensated row pays for the pooled keys."""
        return 1.0 - float(computed(mask.sum(dim=-1), compensate, mask.shape[-1], self.task.block_size))
