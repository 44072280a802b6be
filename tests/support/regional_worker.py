"""One process of two, on the CPU through gloo: blocks that are graphs of their own, under context parallelism.

python -m support.regional_worker RANK WORLD FILE NAME...: both meet at FILE and run the scenarios of these names;
process 0 prints a line of JSON, {name: results of both ranks}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from zoo.models import ZOO

from support.graphs import call, drad, relative_error
from support.parallel_worker import SPARSE, ring_forward


@dataclass(frozen=True)
class Scenario:
    """A tiny Wan for grids one after the other; in_blocks: `compile_repeated_blocks`, else graphs break at hooks."""

    grids: tuple[tuple[int, int, int], ...] = ((5, 6, 8), (5, 8, 6), (3, 8, 10))
    in_blocks: bool = True
    ring: bool = False


SCENARIOS = {
    "blocks": Scenario(),
    "hooks": Scenario(in_blocks=False),
    "two frames": Scenario(((4, 6, 8),)),
    "resolutions": Scenario(((5, 6, 8), (6, 6, 8), (7, 8, 6))),
    "ring": Scenario(ring=True),
}


def run(scenario: Scenario) -> dict[str, Any]:
    """For each grid errors to one process, sparse and dense, and graphs compiled so far; what the report says."""
    torch._dynamo.reset()
    inputs = [ZOO["wan_t2v"](*grid)[1] for grid in scenario.grids]
    model = ZOO["wan_t2v"]()[0]
    dense = [call(model, one) for one in inputs]
    alone = [call(drad.compile(model, fullgraph=True, dynamic=False, **SPARSE), one) for one in inputs]
    torch._dynamo.reset()
    native = attention_dispatch._native_attention_forward_op
    attention_dispatch._native_attention_forward_op = ring_forward if scenario.ring else native
    ways = {"ring_degree": 2} if scenario.ring else {"ulysses_degree": 2}
    model.enable_parallelism(config=ContextParallelConfig(**ways))
    compiled = model
    if scenario.in_blocks:
        model.compile_repeated_blocks(backend="dynamicrad", options=SPARSE)
    else:
        compiled = torch.compile(model, backend="dynamicrad", options=SPARSE)
    found = []
    for one, sparse, full in zip(inputs, alone, dense, strict=True):
        out = call(compiled, one)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found.append({"sparse": relative_error(out, sparse), "dense": relative_error(out, full), "graphs": graphs})
    attention_dispatch._native_attention_forward_op = native
    report = drad.report(compiled)
    sites = [site for site in report.sites if "attn1" in site.path]
    return {
        "steps": found,
        "replaced": [bool(site.replaced) for site in sites],
        "grids": [site.grid for site in sites],
        "reasons": sorted({site.code or "" for site in sites if not site.replaced}),
        "advice": sorted({site.advice or "" for site in sites if not site.replaced}),
        "notes": report.notes,
    }


def main(rank: int, world: int, meeting: str, names: list[str]) -> None:
    """Run the scenarios in this process."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo the number of accelerators
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    found: dict[str, list[Any]] = {}
    for name in names:
        found[name] = [None] * world
        dist.all_gather_object(found[name], run(SCENARIOS[name]))
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
