"""Blocks that are graphs of their own, of one process of several: its rows of a table show the grid."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from support.exchanges import fake_group, run_together
from support.graphs import OPTIONS, drad, plan_each, relative_error

from dynamicrad_compile.passes import PassContext, run_passes

HEADS, DIM = 12, 12
GRID = (5, 6, 8)
EVEN = [float(i) for i in range(12)]


def exchange(x, into_heads):
    """[B, S / n, H, D] -> [B, S, H / n, D], or back."""
    b, s, h, d = x.shape
    n = dist.get_world_size()
    x = x.reshape(b, n, s // n, h, d).transpose(0, 1) if into_heads else x.reshape(b, s, n, h // n, d)
    x = x if into_heads else x.permute(2, 1, 0, 3, 4)
    heard = collectives.all_to_all_single(x.contiguous(), None, None, dist.group.WORLD)
    if into_heads:
        return heard.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return heard.flatten(0, 1).transpose(0, 1)


class Block(torch.nn.Module):
    """Attention of a video transformer, as diffusers has it under Ulysses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def operands(self, x, rope):
        query, key, value = (y.unflatten(2, (HEADS, -1)) for y in self.qkv(x).chunk(3, -1))
        return query * rope, key * rope, value

    def forward(self, x, rope):
        tokens = [exchange(y, False).transpose(1, 2) for y in self.operands(x, rope)]
        return exchange(F.scaled_dot_product_attention(*tokens).transpose(1, 2), True)


def positions(grid, kind="sines", times=EVEN):
    """The whole table, [tokens, 12]: two frequencies of three axes, or the three numbers."""
    numbers = torch.cartesian_prod(torch.tensor(times[: grid[0]]), *(torch.arange(float(n)) for n in grid[1:]))
    if kind == "numbers":
        return F.pad(numbers, (0, 9))
    angles = (numbers[:, :, None] * torch.tensor([1.0, 0.01])).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], 1)


def seen(table, world, rank, mark=False, dynamic=False, **options):
    """The report of a block of process `rank`, which has its rows of the table."""
    torch._dynamo.reset()
    rows = table.chunk(world)[rank][None, :, None]
    x = torch.randn(1, rows.shape[1], HEADS * DIM)
    if mark:
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(rows, 1)
    options = {**OPTIONS, "sparsity": 0.6, **options}
    compiled = torch.compile(Block().eval(), backend="dynamicrad", dynamic=dynamic, fullgraph=True, options=options)
    with fake_group(rank, world), torch.no_grad():
        compiled(x, rows)
        return drad.report(compiled)  # torch 2.11 forgets graphs when it destroys a group


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["sines", "numbers"])
def test_each_process_reads_the_grid_from_its_rows(world, kind):
    f, h, w = grid = GRID if world == 2 else (12, 12, 4)
    for rank in range(world):
        report = seen(positions(grid, kind), world, rank)
        (site,) = report.sites
        assert (site.grid, site.replaced) == (grid, True)
        assert "this process's rows of" in report.notes[-1]
        assert f"{f}x{h}x{w} and {f}x{w}x{h} run sparse" in report.notes[-1]


VIDEO, TEXT = positions((4, 6, 9)), positions((1, 1, 1)).expand(12, -1)
DENSE = {
    "too few frames": (positions(GRID), 4),
    "text in front": (torch.cat([torch.randn(24, 12), VIDEO]), 2),
    "text behind": (torch.cat([VIDEO, torch.randn(24, 12)]), 2),
    "text on each": (torch.cat([TEXT, VIDEO[:108], TEXT, VIDEO[108:]]), 2),
    "pictures": (positions((6, 6, 8), times=[0.0, 5.0, 1.0, 0.0, 7.0, 3.0]), 2),
    "few numbered pictures": (positions((4, 6, 9), "numbers"), 2),
}


@pytest.mark.parametrize("name", DENSE)
def test_rows_that_do_not_tell_the_grid_stay_dense_on_each_process(name):
    table, world = DENSE[name]
    for rank in range(world):
        (site,) = seen(table, world, rank).sites
        assert not site.replaced, rank
        assert site.code == "shard_shows_no_grid"
        assert "set `grid`" in site.advice


def test_symbolic_sizes_become_constants():
    report = seen(positions(GRID), 2, 1, dynamic=True)
    (site,) = report.sites
    assert (site.grid, site.replaced) == (GRID, True)
    assert "5x6x8 and 5x8x6 run sparse" in report.notes[-1]


def test_sizes_that_may_not_become_constants_stay_dense():
    (site,) = seen(positions(GRID), 2, 1, mark=True, dynamic=None).sites
    assert not site.replaced
    assert site.code == "dynamic_sizes"


@pytest.mark.parametrize("table", [torch.randn(240, 12), positions(GRID)])
def test_a_grid_that_is_given_needs_no_table(table):
    """It is not read at all: other processes may not be able to, and all must send alike."""
    report = seen(table, 2, 0, grid=GRID)
    (site,) = report.sites
    assert (site.grid, site.replaced) == (GRID, True)
    assert not any("this process's rows" in note for note in report.notes)


def test_processes_whose_rows_tell_nothing_compute_their_heads_dense():
    """Of five frames on three processes the second alone sees some of three."""
    plan = drad.make_plan(
        "dynamicrad", GRID, 16, sparsity=0.6, regime="mid", compensate=0.0, profile=OPTIONS["profile"]
    )
    block, ropes = Block().eval(), positions(GRID)[None, :, None]
    x = torch.randn(1, 240, HEADS * DIM)
    graphs, videos = [], []
    for rank in range(3):

        def backend(gm, inputs):
            context = PassContext(plan_each(lambda video: plan), example_inputs=inputs)
            run_passes(gm, context)
            graphs.append((gm, inputs))
            videos.append(context.videos)
            return gm.forward

        torch._dynamo.reset()
        with fake_group(rank, 3), torch.no_grad():
            torch.compile(block, backend=backend, fullgraph=True)(x.chunk(3, 1)[rank], ropes.chunk(3, 1)[rank])
    assert [len(found) for found in videos] == [0, 1, 0]
    assert videos[1][0].exchange is None  # heads are sent as they come
    with torch.no_grad():
        q, k, v = (y.transpose(1, 2) for y in block.operands(x, ropes))
        places = torch.arange(240) // 16 if plan.order is None else plan.order[0].argsort() // 16
        allowed = torch.ones(HEADS, 240, 240, dtype=torch.bool)
        allowed[4:8] = plan.block_mask()[0, 0][places][:, places]
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)
    got = torch.cat(run_together(graphs), 1)
    assert relative_error(got, want) < 1e-5
    assert relative_error(got, F.scaled_dot_product_attention(q, k, v).transpose(1, 2)) > 1e-4
