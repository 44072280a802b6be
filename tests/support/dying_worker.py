"""One process of two under Ulysses, of which the other dies: process 0 prints the error that it gets, as JSON."""

from __future__ import annotations

import datetime
import json
import os
import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from support.graphs import call, drad
from support.parallel_worker import CASES, SPARSE


def main(rank: int, world: int, meeting: str) -> None:
    """Run one step with all processes, and one without the last."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)
    model, kwargs, _ = CASES["wan22_ti2v"]()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    call(model, kwargs)
    compiled = drad.compile(model, fullgraph=True, **SPARSE)
    call(compiled, kwargs)
    replaced = len(drad.report(compiled).replaced)
    if rank == world - 1:
        os._exit(0)
    try:
        call(compiled, kwargs)
        raised = ""
    except RuntimeError as error:
        raised = f"{type(error).__name__}: {error}"
    print(json.dumps({"replaced": replaced, "raised": raised}), flush=True)
    os._exit(0)  # a group with a dead member can't be taken down


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
