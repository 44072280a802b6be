"""Blocks that are graphs of their own, of one process of several: its rows of a table show the grid."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from support.graphs import OPTIONS, drad
from torch.testing._internal.distributed.fake_pg import FakeStore

HEADS, DIM = 8, 12
EVEN = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


@pytest.fixture
def processes():
    """Start a group of so many processes, of which this is one; nothing is sent."""

    def start(world, rank):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield start
    dist.destroy_process_group()


def exchange(x, into_heads):
    """[B, S / n, H, D] -> [B, S, H / n, D], or back."""
    n = dist.get_world_size()
    x = x.unflatten(1, (n, -1)).transpose(0, 1) if into_heads else x.unflatten(2, (n, -1)).permute(2, 1, 0, 3, 4)
    heard = collectives.all_to_all_single(x.contiguous(), None, None, dist.group.WORLD)
    if into_heads:
        return heard.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return heard.flatten(0, 1).transpose(0, 1)


class Block(torch.nn.Module):
    """Attention of a video transformer, as diffusers has it under Ulysses."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x, rope):
        query, key, value = (y.unflatten(2, (HEADS, -1)) for y in self.qkv(x).chunk(3, -1))
        tokens = [exchange(y, False).transpose(1, 2) for y in (query * rope, key * rope, value)]
        out = F.scaled_dot_product_attention(*tokens).transpose(1, 2)
        return x + exchange(out, True).flatten(2)


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
    with torch.no_grad():
        compiled(x, rows)
    return drad.report(compiled)


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("kind", ["sines", "numbers"])
def test_each_process_reads_the_grid_from_its_rows(processes, world, rank, kind):
    processes(world, rank)
    grid = (5, 6, 8) if world == 2 else (12, 12, 4)
    table = positions(grid, kind, [float(i) for i in range(12)])
    report = seen(table, world, rank)
    (site,) = report.sites
    assert (site.grid, site.replaced) == (grid, True)
    f, h, w = grid
    assert "this process's rows of" in report.notes[-1]
    assert f"{f}x{h}x{w} and {f}x{w}x{h} run sparse" in report.notes[-1]


DENSE = {
    "too few frames": (positions((5, 6, 8)), 4),
    "text in front": (torch.cat([torch.randn(24, 12), positions((4, 6, 9))]), 2),
    "text behind": (torch.cat([positions((4, 6, 9)), torch.randn(24, 12)]), 2),
    "pictures": (positions((6, 6, 8), times=[0.0, 5.0, 1.0, 0.0, 7.0, 3.0]), 2),
    "few numbered pictures": (positions((4, 6, 9), "numbers"), 2),
}


@pytest.mark.parametrize("name", DENSE)
def test_rows_that_do_not_tell_the_grid_stay_dense_on_each_process(processes, name):
    table, world = DENSE[name]
    processes(world, 0)
    for rank in range(world):
        dist.destroy_process_group()
        processes(world, rank)
        (site,) = seen(table, world, rank).sites
        assert not site.replaced, rank
        assert site.code == "shard_shows_no_grid"
        assert "set `grid`" in site.advice


def test_symbolic_sizes_become_constants(processes):
    processes(2, 1)
    report = seen(positions((5, 6, 8)), 2, 1, dynamic=True)
    (site,) = report.sites
    assert (site.grid, site.replaced) == ((5, 6, 8), True)
    assert "5x6x8 and 5x8x6 run sparse" in report.notes[-1]


def test_sizes_that_may_not_become_constants_stay_dense(processes):
    processes(2, 1)
    (site,) = seen(positions((5, 6, 8)), 2, 1, mark=True, dynamic=None).sites
    assert not site.replaced
    assert site.code == "dynamic_sizes"


def test_a_grid_that_is_given_needs_no_table(processes):
    processes(2, 0)
    (site,) = seen(torch.randn(240, 12), 2, 0, grid=(5, 6, 8)).sites
    assert (site.grid, site.replaced) == ((5, 6, 8), True)
