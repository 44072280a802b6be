"""What a model is expected to gain on a device: its attentions by the crossover table, its other products by FLOPs.

It is the model of a step of `parallel.step`, which `simulation` has for many GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch

from ..errors import CrossoverError
from ..plans.crossover import MIN_GAIN, architecture, load, table_for
from ..reporting.expectation import Expectation
from ..reporting.report import Report, SiteReport
from .attentions import attentions_of
from .chips import CHIPS, CPU, Chip
from .step import on_one

HALF = ("float16", "bfloat16")


def expected_on(
    device: torch.device | Chip,
    report: Report,
    *,
    rest_flops: float | None,
    unknown: str = "",
    times: Callable[[SiteReport], float] = lambda site: 1.0,
    forced: bool = False,
) -> Expectation:
    """What the model of a report is expected to gain, with the plans that the report has.

    device      a chip, or a device of this machine
    rest_flops  FLOPs of a call outside of attention; None: not known, and `unknown` says why
    times       how many sites of the model stand behind one of the report
    forced      sparse where it does not pay too (option min_tokens is a number)
    """
    try:
        target = device if isinstance(device, Chip) else _chip_of(device)
    except CrossoverError as error:
        return Expectation(_name_of(device), unknown=str(error))
    name = _name_of(device)
    if target is None:
        return Expectation(name, unknown="no table has figures for this device")
    sites = report.sites
    if any(site.code == "dense_layers" and times(site) != 1 for site in sites):
        return Expectation(
            name, unknown="option dense_layers is for all layers, and not all were captured (--layers 0)"
        )
    if not any(site.replaced for site in sites):
        return Expectation(name, 1.0, 1.0, basis="no attention is sparse")
    attentions = [
        replace(one, count=round(one.count * number))
        for number, alike in itertools.groupby(sorted(sites, key=times), key=times)
        for one in attentions_of(alike)
    ]
    if any(site.replaced and site.shape is None for site in sites):
        return Expectation(name, unknown="the size of its attention depends on data")
    half = target.arch != "cpu" or any(site.replaced and site.dtype in HALF for site in sites)
    step = on_one(attentions, target, rest_flops or 0.0, half, 0.0 if forced else MIN_GAIN)
    figures = "; ".join(dict.fromkeys(f"{one.machine}, {one.date}" for one in step.gains))
    attention_ms = step.dense_ms - step.rest_ms
    gain = attention_ms / (step.sparse_ms - step.rest_ms)
    measured = all(one.source == "measured" for one in step.gains)
    basis = f"attention alone measured on {figures}" if measured else f"estimated, nothing measured: {figures}"
    if gain == 1.0:
        return Expectation(name, 1.0, 1.0, measured=measured, basis=f"attention stays dense there ({basis})")
    if rest_flops is None:
        return Expectation(name, gain, measured=measured, basis=basis, unknown=unknown)
    if measured:
        basis += "; its share of a step by FLOPs"
    return Expectation(name, gain, step.dense_ms / step.sparse_ms, attention_ms / step.dense_ms, measured, basis)


def _chip_of(device: torch.device) -> Chip | None:
    """Rates of a device of this machine, by its row of the crossover table; None where nothing is known of it."""
    arch = architecture(device)
    table = None if arch is None else table_for(load(), arch)
    return next((one for one in (CPU, *CHIPS.values()) if table is not None and one.arch == table.arch), None)


def _name_of(device: torch.device | Chip) -> str:
    if isinstance(device, Chip):
        return device.name
    if device.type == "cuda" and torch.cuda.is_available():
        return f"this GPU, {torch.cuda.get_device_name(device)}"
    return CPU.name if device.type == "cpu" else str(device)
