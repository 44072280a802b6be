"""One process of several: models of diffusers without a plan of their own under `drad.shard`, on CPU through gloo.

python -m support.shard_worker RANK WORLD FILE CASE...: all meet at FILE; process 0 prints a line of JSON, the largest
of all processes' errors and their reports. CASE: a key of CASES.
"""

from __future__ import annotations

import json
import math
import sys

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from zoo import models as zoo

from support.graphs import OPTIONS, call, drad, make, relative_error

UNEQUAL = {"f": 5, "h": 3, "w": 5}  # 75 tokens
CASES = {
    "hunyuan_video": ("hunyuan_video", {"batch": 2}),
    "hunyuan_video_unequal": ("hunyuan_video", UNEQUAL),
    "hunyuan_video_i2v": ("hunyuan_video_i2v", UNEQUAL),
    "hunyuan_video15": ("hunyuan_video15", UNEQUAL),
    "cogvideox_2b": ("cogvideox_2b", UNEQUAL | {"batch": 2}),
    "cogvideox_5b_unequal": ("cogvideox_5b", UNEQUAL),
    "easyanimate": ("easyanimate", UNEQUAL),
    "cogvideox_5b_heads": ("cogvideox_5b", UNEQUAL),
    "mochi": ("mochi", UNEQUAL | {"batch": 2}),
    "skyreels_v2": ("skyreels_v2", UNEQUAL),
}
OWN = {"skyreels_v2": drad.ShardPlan(blocks=("blocks",), attention="attn1", out="proj_out", tables={"rotary_emb": 1})}
BREAKS = ("hunyuan_video15",)  # its text is put in order by values


def row_a_head(grid, text_before, text_after):
    """A block mask of its own for each of four heads."""
    number = -(-(math.prod(grid) + text_before + text_after) // 16)
    kept = torch.rand(4, number, number, generator=torch.Generator().manual_seed(1)) < 0.4
    return kept | torch.eye(number, dtype=torch.bool)


def main(rank, world, meeting, cases):
    torch.set_num_threads(1)
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    for config in (zoo._HY, zoo._COG, zoo._WAN):
        config["num_attention_heads"] = 4
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    results = {case: compared(mesh, case) for case in cases}
    if world == 2:
        results |= {"blocks": blocks(mesh), "gradients": gradients(mesh)}
    everyone = [None] * world
    dist.all_gather_object(everyone, results)
    if rank == 0:
        print(json.dumps(everyone))
    dist.destroy_process_group()


def compared(mesh, case):
    """Relative errors to one process, dense and sparse, and what was compiled."""
    name, sizes = CASES[case]
    model, kwargs, _ = make(name, **sizes)
    for block in model.modules():
        if hasattr(block, "heads") and block.heads % mesh.size():
            return {"heads": block.heads}
    options = {**OPTIONS, "plan": row_a_head} if case.endswith("_heads") else {**OPTIONS, "sparsity": 0.6}
    known = [None, None, None]
    if dist.get_rank() == 0:
        compiled = torch.compile(model, backend="dynamicrad", options=options)
        known = [call(model, kwargs), call(compiled, kwargs), sites(compiled)]
        torch._dynamo.reset()
    dist.broadcast_object_list(known)
    dense, sparse, expected = known
    drad.shard(model, mesh, OWN.get(name))
    eager = relative_error(call(model, kwargs), dense)
    compiled = torch.compile(model, backend="dynamicrad", options=options, fullgraph=name not in BREAKS)
    error = relative_error(call(compiled, kwargs), sparse)
    counters.clear()
    later = {**kwargs, "timestep": kwargs["timestep"] - 20}
    call(compiled, later)
    found = {
        "dense": eager,
        "sparse": error,
        "apart": relative_error(sparse, dense),
        "alike": sites(compiled) == expected,
        "sites": sites(compiled),
        "recompiled": counters["stats"]["unique_graphs"],
    }
    drad.unshard(model)
    return {**found, "undone": relative_error(call(model, kwargs), dense)}


def sites(compiled):
    """Grid, text and whether it is sparse, of every self-attention over the video."""
    found = [site.to_dict() for site in drad.report(compiled).sites]
    videos = [site for site in found if site["role"] == "video_self_attention"]
    return [{name: site[name] for name in ("replaced", "grid", "text_tokens", "sparsity")} for site in videos]


def blocks(mesh):
    """Error of blocks that are compiled one by one."""
    kwargs, outs, reports = make("cogvideox_5b", **UNEQUAL)[1], [], []
    for is_shared in (False, True):
        torch._dynamo.reset()
        model = make("cogvideox_5b", **UNEQUAL)[0]
        if is_shared:
            drad.shard(model, mesh)
        for block in model.transformer_blocks:
            block.compile(backend="dynamicrad", options={**OPTIONS, "sparsity": 0.6}, fullgraph=True)
        outs.append(call(model, kwargs))
        reports.append(sites(model))
    return {"error": relative_error(outs[1], outs[0]), "alike": reports[0] == reports[1]}


def gradients(mesh):
    """Largest relative error of a parameter's gradient, averaged over the processes as DDP does."""
    model, kwargs, _ = make("cogvideox_5b", **UNEQUAL)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def of_loss():
        return torch.autograd.grad(model(**kwargs)[0].square().mean(), weights, allow_unused=True)

    alone = of_loss()
    drad.shard(model, mesh)
    shared = of_loss()
    errors = []
    for one, other in zip(alone, shared, strict=True):
        if one is not None and other is not None:
            dist.all_reduce(other)
            errors.append(relative_error(other / mesh.size(), one))
    return {"largest": max(errors), "weights": len(errors)}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
