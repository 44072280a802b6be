"""The objective: error of a mode's parameters on draws of the proxies, at the sparsity that would be executed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PlanError
from ..plans.cost import computed, mean_keys
from ..plans.make import make_candidates, make_plan
from .captures import load_capture
from .choosing import Choice, fit_thresholds
from .proxy import PROXIES
from .sums import BlockSums, sample_rows
from .task import HELD_OUT_SEEDS, Task

ERROR_WEIGHT = 1000.0
SPARSITY_WEIGHT = 10000.0
# Thresholds are set for this much more sparsity than asked, because other content selects a little more.
MARGIN = 0.0005

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What one point gave.

    parameters  as in the profile's table of the mode
    status      "ok", or "pruned" for a point that the planner refuses or that gives no finite error
    reason      why it was pruned
    error       mean squared error over the variance of dense attention; mean over the draws
    sparsity    share of dense attention that is skipped, compensation counted; mean over the draws
    loss        1000 * error + 10000 * max(0, target - sparsity), the published search's
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


class Objective:
    """Evaluates parameters for one regime of motion. Building it computes the block sums of all draws.

    With `held_out` on the draws and captures that no search sees, if there are any (`Task.holds_out`).
    """

    def __init__(self, task: Task, regime: str, held_out: bool = False) -> None:
        self.task = task
        self.regime = regime
        seeds = HELD_OUT_SEEDS if held_out else task.seeds
        drawn = {proxy: seeds for proxy in task.proxies if proxy != "captured"}
        if "captured" in task.proxies:
            drawn["captured"] = tuple(number for number, _ in task.captures_of(regime, held_out))
        self.names = [(proxy, seed) for proxy, seeds in drawn.items() for seed in seeds]
        self.sums = [self._draw(proxy, seed) for proxy, seed in self.names]

    def _draw(self, proxy: str, seed: int) -> BlockSums:
        task = self.task
        if proxy == "captured":
            q, k, v = load_capture(task.captures[seed])
        else:
            text = (task.text_before, task.text_after)
            q, k, v = PROXIES[proxy](task.grid, self.regime, task.proxy_heads(proxy), task.head_dim, seed, *text)
        sums = BlockSums(q, k, v, task.block_size, sample_rows(task.tokens, task.sampled_rows(proxy), seed))
        if proxy == "captured":
            sums.equalise()  # the sizes of a model's heads differ by far
        return sums

    def evaluate(self, mode: str, parameters: Parameters, balance: float | None = None) -> Evaluation:
        """Evaluate one point; with `balance`, near and far are first set so that the target sparsity is met.

        A point that the planner refuses (PlanError), and one whose error is not finite, is pruned and says why.
        Any other error is a defect and is raised.
        """
        start = time.perf_counter()
        try:
            masks, parameters = self._masks(mode, parameters, balance)
        except PlanError as problem:
            return Evaluation(parameters, "pruned", str(problem), seconds=time.perf_counter() - start)
        draws = []
        for (proxy, seed), sums, mask in zip(self.names, self.sums, masks, strict=True):
            error = sums.error(mask, parameters["compensate"])
            draws.append((proxy, seed, error, self._sparsity(mask, parameters["compensate"])))
        error = sum(draw[2] for draw in draws) / len(draws)
        sparsity = sum(draw[3] for draw in draws) / len(draws)
        seconds = time.perf_counter() - start
        if not math.isfinite(error):
            return Evaluation(parameters, "pruned", f"the error is {error}", draws=tuple(draws), seconds=seconds)
        loss = ERROR_WEIGHT * error + SPARSITY_WEIGHT * max(0.0, self.task.sparsity - sparsity)
        return Evaluation(parameters, "ok", "", error, sparsity, loss, tuple(draws), seconds)

    def _masks(self, mode: str, parameters: Parameters, balance: float | None) -> tuple[list[torch.Tensor], Parameters]:
        task = self.task
        where = (task.grid, task.block_size, task.text_before, task.text_after)
        if mode == "static_ratio":
            mask = make_plan("dynamicrad", *where, **parameters).block_mask()[0]
            return [mask] * len(self.sums), parameters
        prior = {name: value for name, value in parameters.items() if name not in ("criterion", "near", "far")}
        candidates = make_candidates(*where, **prior)
        choices = [Choice(sums, candidates, parameters["criterion"]) for sums in self.sums]
        if balance is not None:
            paid = mean_keys(task.block_size, parameters["compensate"])
            near, far = fit_thresholds(choices, 1.0 - task.sparsity - paid - MARGIN, balance)
            parameters = {**parameters, "near": near, "far": far}
        return [choice.mask(parameters["near"], parameters["far"]) for choice in choices], parameters

    def _sparsity(self, mask: torch.Tensor, compensate: float) -> float:
        """Share of dense attention that the mask [H', Mq, Mk] skips; a compensated row pays for the pooled keys."""
        return 1.0 - float(computed(mask.sum(dim=-1), compensate, mask.shape[-1], self.task.block_size))
