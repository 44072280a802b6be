"""One process of two: a tiny Wan of four heads under diffusers' Ulysses, whose heads have unequal work.

python -m support.heads_worker RANK WORLD FILE: process 0 prints a line of JSON, the results of all ranks.
"""

from __future__ import annotations

import datetime
import json
import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from support.graphs import OPTIONS, call, drad, relative_error
from support.parallel_worker import wan_4_heads


def unequal_heads():
    """bool [4, 15, 15]: the first two heads read most blocks, the others few."""
    shares = torch.tensor([0.9, 0.75, 0.2, 0.1])[:, None, None]
    kept = torch.rand(4, 15, 15, generator=torch.Generator().manual_seed(0)) < shares
    return kept | torch.eye(15, dtype=torch.bool)


def results(world):
    """Error to one process, active blocks of this rank's plan, and the report's lines about heads."""
    options = {**OPTIONS, "plan": unequal_heads()}
    model, kwargs, _ = wan_4_heads()
    dense = call(model, kwargs)
    want = call(drad.compile(model, fullgraph=True, **options), kwargs)
    torch._dynamo.reset()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    call(model, kwargs)  # diffusers' hooks look their arguments up once, which Dynamo can't follow
    compiled = drad.compile(model, fullgraph=True, **options)
    got = call(compiled, kwargs)
    report = drad.report(compiled)
    return {
        "error": relative_error(got, want),
        "to_dense": relative_error(got, dense),
        "blocks": [int(site.plan.kv_counts.sum()) for site in report.replaced],
        "notes": [note for note in report.notes if note.startswith("heads ")],
    }


def main(rank, world, meeting):
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo the number of accelerators
    timeout = datetime.timedelta(seconds=240)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)
    found = [None] * world
    dist.all_gather_object(found, results(world))
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
