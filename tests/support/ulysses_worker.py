"""One process of two: a tiny Wan under diffusers' Ulysses context parallelism, on CPU through gloo.

python ulysses_worker.py RANK FILE: both processes meet at FILE; process 0 prints a line of JSON.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from support.graphs import OPTIONS, call, drad, make, relative_error


def main(rank, meeting):
    torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo the number of accelerators
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model, kwargs, _ = make("wan22_ti2v")
    alone = call(model, kwargs)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    options = {**OPTIONS, "sparsity": 0.6, "grid": (5, 6, 8)}
    compiled = torch.compile(model, backend="dynamicrad", options=options)
    error = relative_error(call(compiled, kwargs), alone)
    sites = [site.to_dict() for site in drad.report(compiled).sites]
    if rank == 0:
        found = [{name: site[name] for name in ("role", "replaced", "code", "advice", "shape")} for site in sites]
        print(json.dumps({"error": error, "sites": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
