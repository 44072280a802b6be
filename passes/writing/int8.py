"""Nodes of dense steps with int8 scores, while sparse ones stay exact (qk_dtype "int8_dense").

    %exact = block_sparse_attention(%q, %k, %v, where(%dense, 0, %counts), ...)
    %rounded = block_sparse_attention(%q, %k, %v, where(%dense, %counts, 0), ..., qk_int8=True)
    %pair = where(%dense, %rounded, %exact)

Which of the two has rows to read is decided on the device; the other one has none, and ends at once.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from dynamicrad_compile.runtime import stage
from dynamicrad_compile.runtime.clock import STEP

from ..site import PlannedSite
from .control import Controls


def up_to(clock: Tensor, step: int) -> Tensor:
    """bool []: whether the present step is one of the first, `step` included."""
    return clock[STEP] <= step


def unless(skip: Tensor, x: Tensor) -> Tensor:
    """x, or zeros of its shape where `skip`, bool []."""
    return torch.where(skip, torch.zeros_like(x), x)


def dense_steps(planned: PlannedSite, controls: Controls) -> fx.Node | None:
    """Node of bool []: whether all rows of a site are dense at this step; None where no step is."""
    call, found = controls.graph.call_function, []
    if controls.control.gates:
        found.append(controls.dense())
    spec, plan = planned.spec, planned.table.plan
    if spec is not None and spec.stages.number > 1:
        number = spec.stages.number
        full = (plan.kv_counts == plan.num_kv_blocks).flatten(1).all(1).view(-1, number).all(0)
        if bool(full.any()):
            places = tuple(full.nonzero().flatten().tolist())
            found.append(call(stage.is_stage, (controls.stage(spec.stages), places)))
    if planned.table.searches is not None:
        found.append(call(up_to, (controls.clock(), planned.table.searches.search_steps[0])))
    return functools.reduce(lambda a, b: call(torch.logical_or, (a, b)), found) if found else None


def attend(graph: fx.Graph, op: Any, arguments: tuple[Any, ...], dense: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes of an attention op for sparse steps, and of out and lse, with int8 scores where `dense`."""
    call = graph.call_function
    sparse_step = call(torch.logical_not, (dense,))
    counts = arguments[3]
    exact = [*arguments]
    exact[3] = call(unless, (dense, counts))
    if len(arguments) > 9:  # nothing stands for what the other one reads
        exact[9] = call(unless, (dense, arguments[9]))
    rounded = (*arguments[:3], call(unless, (sparse_step, counts)), *arguments[4:9])
    pairs = (
        call(op, tuple(exact)),
        call(torch.ops.dynamicrad.block_sparse_attention.default, rounded, {"qk_int8": True}),
    )
    one, other = (tuple(call(operator.getitem, (pair, place)) for place in (0, 1)) for pair in pairs)
    out, lse = (call(torch.where, (dense, b, a)) for a, b in zip(one, other, strict=True))
    return pairs[0], out, lse
