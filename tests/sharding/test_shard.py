"""`shard`: which graphs its exchanges make, what it refuses, and, in several processes, that nothing else changes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import shard_worker
from support.graphs import OPTIONS, call, make, relative_error
from support.marks import slow
from support.processes import output_of, start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from zoo import models as zoo

import dynamicrad_compile as drad

UNEQUAL = shard_worker.UNEQUAL
IN_FOUR = ["hunyuan_video_i2v", "cogvideox_2b"]


@pytest.fixture
def peers(monkeypatch):
    """Makes this process one of several whose exchanges are none, and models of four heads."""
    for config in (zoo._HY, zoo._COG):
        monkeypatch.setitem(config, "num_attention_heads", 4)

    def start(rank, world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return init_device_mesh("cpu", (world,))

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def compiled_sites(model, kwargs):
    compiled = torch.compile(model, backend="dynamicrad", options={**OPTIONS, "sparsity": 0.6}, fullgraph=True)
    call(compiled, kwargs)
    return [site for site in drad.report(compiled).sites if site.role == "video_self_attention"]


@pytest.mark.parametrize(
    ("name", "sizes", "rank", "world", "text"),
    [
        ("cogvideox_2b", {}, 1, 2, (7, 0)),
        slow("cogvideox_5b", UNEQUAL, 0, 2, (7, 0)),
        ("hunyuan_video_i2v", UNEQUAL, 1, 4, (0, 9)),
    ],
)
def test_a_graph_of_one_process_has_the_whole_grid(peers, name, sizes, rank, world, text):
    model, kwargs, expected = make(name, **sizes)
    drad.shard(model, peers(rank, world))
    sites = compiled_sites(model, kwargs)
    assert len(sites) == expected["n_video_self_attn_nodes"]
    assert all(site.replaced and site.grid == expected["grid"] and site.text_tokens == text for site in sites)
    assert all(site.shape[1] == 4 // world for site in sites)


def test_one_compiled_block_has_the_whole_grid(peers):
    model, kwargs, _ = make("cogvideox_5b", **UNEQUAL)
    drad.shard(model, peers(1, 2))
    for block in model.transformer_blocks:
        block.compile(backend="dynamicrad", options={**OPTIONS, "sparsity": 0.6}, fullgraph=True)
    call(model, kwargs)
    report = drad.report(model)
    assert len(report.replaced) == len(report.graphs) == 2
    assert all(site.grid == (5, 3, 5) for site in report.replaced)


def test_without_processes():
    model, _, _ = make("cogvideox_2b")
    with pytest.raises(drad.ShardError, match="not initialised"):
        drad.shard(model, None)


def test_one_process_changes_nothing(peers):
    model, kwargs, _ = make("cogvideox_2b")
    before = call(model, kwargs)
    assert drad.shard(model, peers(0, 1)) is model
    assert torch.equal(call(model, kwargs), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_undone(peers):
    model, kwargs, _ = make("cogvideox_2b")
    before = call(model, kwargs)
    drad.shard(model, peers(0, 2))
    assert relative_error(call(model, kwargs), before) > 0.1  # nobody sends anything
    with pytest.raises(drad.ShardError, match="sharded already"):
        drad.shard(model, init_device_mesh("cpu", (2,)))
    other = drad.unshard(copy.deepcopy(model))
    assert torch.equal(call(other, kwargs), before)
    assert relative_error(call(model, kwargs), before) > 0.1
    assert torch.equal(call(drad.unshard(model), kwargs), before)
    with pytest.raises(drad.ShardError, match="not sharded"):
        drad.unshard(model)


def test_what_does_not_fit(peers):
    mesh = peers(0, 8)
    model, _, _ = make("cogvideox_2b")
    with pytest.raises(drad.ShardError, match="4 heads, which can't be shared out among 8"):
        drad.shard(model, mesh)
    with pytest.raises(drad.ShardError, match=r"2 dimensions, expected one.*mesh\["):
        drad.shard(model, init_device_mesh("cpu", (2, 4), mesh_dim_names=("a", "b")))
    with pytest.raises(drad.ShardError, match="enable_parallelism"):
        drad.shard(make("wan_t2v")[0], mesh)
    with pytest.raises(drad.ShardError, match="no plan for Linear; known are CogVideoX"):
        drad.shard(nn.Linear(2, 2), mesh)
    plan = drad.ShardPlan(blocks=("layers",), attention="attn", out="proj_out")
    with pytest.raises(drad.ShardError, match="no module 'layers'"):
        drad.shard(model, mesh, plan)


class Block(nn.Module):
    """One attention of four heads: of the tokens, of a few of them, or none that is known."""

    def __init__(self, kind):
        super().__init__()
        self.attn, self.kind = nn.Identity(), kind
        self.attn.forward = self.attend

    def attend(self, x):
        x = x.unflatten(-1, (4, -1)).transpose(1, 2)
        if self.kind == "unknown":
            return (x @ x.mT).softmax(-1) @ x
        keys = x[:, :, :2] if self.kind == "fewer" else x
        return F.scaled_dot_product_attention(x, keys, keys)

    def forward(self, x, table=None):
        x = x if table is None else x + table
        return self.attn(x).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, kind="tokens"):
        super().__init__()
        self.blocks, self.out = nn.ModuleList([Block(kind)]), nn.Identity()

    def forward(self, x, table=None):
        return self.out(self.blocks[0](x, table))


PLAN = drad.ShardPlan(blocks=("blocks",), attention="attn", out="out", tokens="x", tables={"table": 1})


@pytest.mark.parametrize(
    ("kind", "rows", "table", "message"),
    [
        ("unknown", 6, None, "set its attention backend"),
        ("fewer", 6, None, "3 queries and 2 keys"),
        ("tokens", 1, None, "1 video tokens can't be sharded over 2"),
        ("tokens", 6, torch.zeros(1, 5, 8), "5 rows for 6 video tokens"),
    ],
)
def test_a_plan_that_is_not_the_models(peers, kind, rows, table, message):
    model = drad.shard(Model(kind), peers(0, 2), PLAN)
    with pytest.raises(drad.ShardError, match=message):
        model(torch.randn(1, rows, 8), table)


def test_heads_that_show_late(peers):
    model = drad.shard(Model(), peers(0, 3), PLAN)
    with pytest.raises(drad.ShardError, match="4 heads can't be shared out among 3"):
        model(torch.randn(1, 6, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [case for case in shard_worker.CASES if case not in IN_FOUR]),
        (4, IN_FOUR),
    ],
)
def test_like_one_process(world, cases, tmp_path):
    """Dense, sparse, in parts and backwards; unequal shards, a batch of 2, each model of the table."""
    workers = start("support.shard_worker", world, tmp_path / "meeting", cases)
    for results in json.loads(output_of(workers)):
        for case in cases:
            found = results[case]
            assert max(found["dense"], found["sparse"], found["undone"]) < 1e-5, (case, found)
            assert found["apart"] > 1e-3  # else sparse would say nothing
            assert found["alike"] or case.endswith("_heads"), (case, found)  # of which each process has its own
            assert all(site["replaced"] for site in found["sites"]), (case, found)
            assert len(found["sites"]) > 1
            assert found["recompiled"] == 0, case
        if world == 2:
            assert results["blocks"]["error"] < 1e-5
            assert results["blocks"]["alike"]
            assert results["gradients"]["largest"] < 1e-5
            assert results["gradients"]["weights"] > 40
