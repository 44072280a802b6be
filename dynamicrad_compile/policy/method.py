"""What a plan does, in a line for the report: its blocks, how they are chosen, what stands for dropped ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..options import Options
from ..passes import PlannedSite
from ..plans.table import RegimeSpec
from ..profiles.parameters import AdaSpa


def method_of(planned: PlannedSite) -> str:
    """The line; '' for a plan whose blocks are runs of tokens, chosen by place alone."""
    if planned.spec is None:
        return ""
    plan = planned.table.plan
    sparse = [
        regime for regime in planned.spec.regimes if getattr(regime.parameters, "sparsity", 1.0) or regime.criterion
    ]
    regimes = sparse or planned.spec.regimes
    boxes = _each(regimes, lambda regime: "raster" if regime.box is None else "x".join(map(str, regime.box)))
    chosen = _each(regimes, _choice)
    if not any(plan.compensate):
        stands = "nothing"
    else:
        stands = "mean and covariances" if plan.covariance else "mean"
    if (boxes, chosen, stands) == ("raster", "by place", "nothing"):
        return ""
    whole = all(regime.box is None or math.prod(regime.box) == plan.block_kv for regime in regimes)
    what = f"{'' if whole else 'cut from '}boxes of {boxes} (frames x height x width)"
    what = "runs in raster order" if boxes == "raster" else what
    return f"blocks of {plan.block_kv} tokens are {what}, chosen {chosen}; for a dropped one stands {stands}"


def _choice(regime: RegimeSpec) -> str:
    if isinstance(regime.parameters, AdaSpa):
        return f"by {regime.parameters.rank}, searched at steps {', '.join(map(str, regime.parameters.search_steps))}"
    return f"by {regime.rank}" if regime.criterion else "by place"


def idle_covariance(planned: PlannedSite, options: Options) -> str:
    """That option covariance was asked for in vain; '' if it was not."""
    if not options.covariance or any(planned.table.plan.compensate):
        return ""
    return "option covariance does nothing here: no plan compensates (compensate is 0)"


def _each(regimes: Sequence[RegimeSpec], what: Callable[[RegimeSpec], str]) -> str:
    """What all regimes have, or each with its name."""
    found = [what(regime) for regime in regimes]
    if len(set(found)) == 1:
        return found[0]
    texts = (f"{text} ({regime.name})" for text, regime in zip(found, regimes, strict=True))
    return ", ".join(dict.fromkeys(texts))
