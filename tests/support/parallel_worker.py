"""One process of several, on the CPU through gloo: tiny models under diffusers' context parallelism.

python -m support.parallel_worker RANK WORLD FILE NAME...: all meet at FILE and run the scenarios of these names, one
after the other; process 0 prints a line of JSON, {name: results of all ranks}.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from zoo.models import _WAN, ZOO, _m
from zoo.more import ZOO_MORE

from support.graphs import OPTIONS, call, drad, relative_error

CASES = {**ZOO, **ZOO_MORE}
SPARSE = {**OPTIONS, "sparsity": 0.6}
OURS = {**SPARSE, "profile": "default"}


@dataclass(frozen=True)
class Scenario:
    """A model under ulysses x ring processes; fresh: its hooks are first called while it is compiled."""

    case: str = "wan22_ti2v"
    sizes: dict[str, Any] = field(default_factory=dict)
    ulysses: int = 1
    ring: int = 1
    options: dict[str, Any] = field(default_factory=lambda: SPARSE)
    steps: int = 1
    fullgraph: bool = True
    fresh: bool = False


def _mask(heads: int, blocks: int) -> torch.Tensor:
    """A block mask of its own for each head; each row keeps its own block."""
    kept = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(1)) < 0.4
    return kept | torch.eye(blocks, dtype=torch.bool)


MODELS = ("wan22_ti2v", "chronoedit", "ltx", "ltx2", "minimax_h3", "helios_nohist")
PATTERNS = {
    "radial": {**SPARSE, "pattern": "radial"},
    "lvsa": {**SPARSE, "pattern": "lvsa", "reference_frames": 3, "window": 1},
    "static": {**OURS, "mode": "static_ratio"},
    "dynamic": {**OURS, "mode": "dynamic_threshold"},
    "mass": {**OURS, "mode": "dynamic_threshold", "rank": "mass", "compensate": 0.0},
    "adaspa": {**SPARSE, "pattern": "adaspa", "search_steps": (0,)},
    "mask": {**OPTIONS, "plan": _mask(2, 15)},
}
RAGGED = {"f": 5, "h": 6, "w": 9}  # 270 tokens: 16.9 blocks of 16, and shards that begin within a block
ALIGNED = {"f": 4, "h": 8, "w": 8}  # shards are whole blocks

TWO = {
    **{f"ulysses {case}": Scenario(case, ulysses=2) for case in MODELS},
    **{f"ring {case}": Scenario(case, ring=2) for case in MODELS if case not in ("chronoedit", "ltx2")},
    **{
        f"ulysses {name}": Scenario(ulysses=2, options=options, steps=2 if name == "adaspa" else 1)
        for name, options in PATTERNS.items()
    },
    **{
        f"ring {name}": Scenario(sizes=ALIGNED, ring=2, options={**options, "box": "raster"})
        for name, options in PATTERNS.items()
        if name in ("static", "dynamic", "mass")
    },
    **{f"ring {name}": Scenario(ring=2, options=PATTERNS[name]) for name in ("radial", "lvsa", "mask")},
    "ulysses ragged": Scenario(sizes=RAGGED, ulysses=2),
    "ring ragged": Scenario(sizes=RAGGED, ring=2),
    "ulysses guided": Scenario("wan_t2v", {"batch": 2}, ulysses=2, fullgraph=False),
    "ring guided": Scenario("wan_t2v", {"batch": 2}, ring=2, fullgraph=False),
    "ulysses steps": Scenario(ulysses=2, options={**OURS, "dense_steps": 1}, steps=3),
    "ring steps": Scenario(ring=2, steps=3),
    "ring stays dense": Scenario(ring=2, options={**SPARSE, "min_tokens": 241}),
    "regional with grid": Scenario(
        "wan_t2v", ulysses=2, options={**SPARSE, "grid": (5, 6, 8)}, fullgraph=False, fresh=True
    ),
}
FOUR = {
    "ulysses": Scenario("wan_4_heads", ulysses=4),
    "ulysses dynamic": Scenario("wan_4_heads", ulysses=4, options=PATTERNS["dynamic"]),
    "ulysses mask": Scenario("wan_4_heads", ulysses=4, options={**OPTIONS, "plan": _mask(4, 15)}),
    "ring": Scenario(ring=4),
    "ring radial": Scenario(ring=4, options=PATTERNS["radial"]),
    "unified": Scenario("wan_4_heads", ulysses=2, ring=2),
    "unified mask": Scenario("wan_4_heads", ulysses=2, ring=2, options={**OPTIONS, "plan": _mask(4, 15)}),
    "unified ragged": Scenario("wan_4_heads", {"f": 5, "h": 6, "w": 10}, ulysses=2, ring=2),
    "unified static": Scenario(
        "wan_4_heads", ALIGNED, ulysses=2, ring=2, options={**PATTERNS["static"], "box": "raster"}
    ),
}
SCENARIOS = {2: TWO, 4: FOUR}


def wan_4_heads(f=5, h=6, w=8, batch=1):
    """Wan 2.2 with a timestep for each token, of four heads."""
    _, kwargs, expected = CASES["wan22_ti2v"](f, h, w, batch)
    return _m("WanTransformer3DModel", **{**_WAN, "num_attention_heads": 4}), kwargs, expected


def _made(scenario: Scenario) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Model, inputs, and what `enable_parallelism` takes beside the configuration."""
    case = scenario.case
    model, kwargs, _ = ({**CASES, "wan_4_heads": wan_4_heads})[case](**scenario.sizes)
    given: dict[str, Any] = {}
    if case.startswith("ltx"):  # a prompt that can be halved; diffusers can't cut masks that have heads
        batch = len(kwargs["encoder_hidden_states"])
        kwargs["encoder_hidden_states"] = torch.randn(batch, 8, 16, generator=torch.Generator().manual_seed(0))
        kwargs |= {name: None for name in kwargs if name.endswith("attention_mask")}
    if case == "ltx2":  # whose plan leaves out the tables by which video and audio read each other
        given["cp_plan"] = {**model._cp_plan, "cross_attn_rope": model._cp_plan["rope"]}
    if case.startswith("helios"):  # whose plan has 40 blocks
        plan = model._cp_plan.items()
        given["cp_plan"] = {name: cut for name, cut in plan if "*" in name or int(name.split(".")[1]) < 2}
    return model, kwargs, given


def _with_lse(ctx, query, key, value, *args, return_lse=False, scale=None, **kwargs):
    """Attention of diffusers' native backend with the log-sum-exp that rings need; on GPUs flash attention has it."""
    q, k, v = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    out = out.permute(0, 2, 1, 3)
    return (out, lse.permute(0, 2, 1)) if return_lse else out


def ring_forward(ctx, query, key, value, mask, dropout_p, is_causal, scale, enable_gqa, return_lse, **kwargs):
    return _with_lse(ctx, query, key, value, scale=scale, return_lse=return_lse)


def _bytes_sent(folder: Path, step: str) -> int:
    """Bytes that the collectives of dumped graphs are given; a symbolic size counts as 1."""
    total = 0
    for file in folder.glob(f"graph_*/*_{step}.txt"):
        shapes = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, rest = line.partition(": ")
            if rest.startswith("float32["):
                sizes = filter(None, rest[8 : rest.index("]")].split(", "))
                shapes[name] = math.prod(int(size) if size.isdigit() else 1 for size in sizes) * 4
            if "_c10d_functional." in rest and "wait_tensor" not in rest:
                total += shapes[rest.partition("_c10d_functional.")[2].partition("(")[2].partition(",")[0]]
    return total


def run(scenario: Scenario) -> dict[str, Any]:
    """Errors to one process, what the report says, graphs compiled, bytes sent."""
    torch._dynamo.reset()
    model, kwargs, given = _made(scenario)
    inputs = [{**kwargs, "timestep": kwargs["timestep"] - 100 * step} for step in range(scenario.steps)]
    alone: list[Any] = [None, None]
    if dist.get_rank() == 0:
        compiled = drad.compile(model, fullgraph=scenario.fullgraph, **scenario.options)
        alone = [call(model, inputs[-1]), [call(compiled, one) for one in inputs]]
        torch._dynamo.reset()
    dist.broadcast_object_list(alone)
    dense, wanted = alone
    native = attention_dispatch._native_attention_forward_op
    if scenario.ring > 1:
        attention_dispatch._native_attention_forward_op = ring_forward
    try:
        config = ContextParallelConfig(ulysses_degree=scenario.ulysses, ring_degree=scenario.ring)
        model.enable_parallelism(config=config, **given)
        if not scenario.fresh:
            call(model, kwargs)  # diffusers' hooks look their arguments up once, which Dynamo can't follow
        with tempfile.TemporaryDirectory() as folder:
            options = {**scenario.options, "dump": folder}
            compiled = drad.compile(model, fullgraph=scenario.fullgraph, **options)
            outs, graphs = [], []
            for one in inputs:
                outs.append(call(compiled, one))
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            before, after = (_bytes_sent(Path(folder), step) for step in ("captured", "replace_attention"))
    finally:
        attention_dispatch._native_attention_forward_op = native
    report = drad.report(compiled)
    return {
        "error": max(relative_error(a, b) for a, b in zip(outs, wanted, strict=True)),
        "to_dense": relative_error(outs[-1], dense),
        "replaced": len(report.replaced),
        "reasons": sorted({site.code or "" for site in report.sites if not site.replaced}),
        "grids": sorted({str(site.grid) for site in report.replaced}),
        "paths": sorted({site.path for site in report.replaced}),
        "graphs": graphs,
        "sent": [before, after],
    }


def main(rank: int, world: int, meeting: str, names: list[str]) -> None:
    """Run the scenarios in this process."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo the number of accelerators
    timeout = datetime.timedelta(seconds=240)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)
    found: dict[str, list[Any]] = {}
    for name in names:
        found[name] = [None] * world
        dist.all_gather_object(found[name], run(SCENARIOS[world][name]))
        if rank == 0:
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
