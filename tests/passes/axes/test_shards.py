"""Shards: which exchanges put a sequence together again. One process of a fake group."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from support.graphs import capture, sites_of
from torch.testing._internal.distributed.fake_pg import FakeStore

from dynamicrad_compile.passes.axes.labels import Peers
from dynamicrad_compile.passes.axes.shards import rows_of_rank

GRID = (6, 4, 5)  # 120 tokens
HEADS, DIM = 8, 4


@pytest.fixture
def group():
    """A fake group of so many processes, of which this is one; subgroups by lists of ranks."""

    def start(world, rank):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield start
    dist.destroy_process_group()


def exchange(x, group, n):
    """[B, S / n, H, D] -> [B, S, H / n, D], as diffusers does."""
    b, s, h, d = x.shape
    x = x.reshape(b, s, n, h // n, d).permute(2, 1, 0, 3, 4).contiguous()
    x = funcol.wait_tensor(funcol.all_to_all_single(x.flatten(), None, None, group)).reshape(x.shape)
    return x.flatten(0, 1).permute(1, 0, 2, 3).contiguous()


def back(x, group, n):
    """[B, S, H / n, D] -> [B, S / n, H, D]."""
    b, s, h, d = x.shape
    x = x.reshape(b, n, s // n, h, d).permute(1, 3, 0, 2, 4).contiguous()
    x = funcol.wait_tensor(funcol.all_to_all_single(x.flatten(), None, None, group)).reshape(x.shape)
    return x.flatten(0, 1).permute(1, 2, 0, 3).contiguous()


class Sharded(torch.nn.Module):
    """Latents [B, C, f, h, w], behind `text` tokens; cut among `world`, exchanged among `group` of n, two layers."""

    def __init__(self, group, n, world, place, cut=None, exchanged=exchange, table=False, text=0):
        super().__init__()
        self.text = text
        self.group, self.n, self.world, self.place = group, n, world, place
        self.cut = cut or (lambda x: x.chunk(world, 1)[place])
        self.exchanged, self.table = exchanged, table
        self.embed = torch.nn.Linear(4, HEADS * DIM)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(HEADS * DIM, 3 * HEADS * DIM) for _ in range(2))

    def forward(self, x):
        tokens = x if self.table else x.flatten(2).transpose(1, 2)
        hidden = self.embed(tokens)
        if self.text:
            hidden = torch.cat([hidden.new_ones(len(x), self.text, hidden.shape[-1]).cumsum(1), hidden], 1)
        hidden = self.cut(hidden)
        if self.table:
            f, h, w = (torch.arange(n, dtype=torch.float32) for n in GRID)
            cube = f[:, None, None, None] + h[:, None, None] + w[:, None] + torch.zeros(*GRID, 1)
            hidden = hidden * self.cut(cube.reshape(1, -1, 1))
        for layer in self.qkv:
            q, k, v = (y.unflatten(2, (HEADS, DIM)) for y in layer(hidden).chunk(3, -1))
            q, k, v = (self.exchanged(y, self.group, self.n).transpose(1, 2) for y in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            hidden = hidden + back(out, self.group, self.n).flatten(2)
        return hidden


def sites(model, x=None):
    with torch.no_grad():
        return sites_of(capture(model, torch.randn(2, 4, *GRID) if x is None else x))


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (2, 1), (4, 3), (8, 5)])
def test_ulysses_shows_the_whole_grid(group, world, rank):
    group(world, rank)
    found = sites(Sharded(dist.group.WORLD, world, world, rank))
    assert [(site.role, site.grid, site.queries) for site in found] == [("video_self_attention", GRID, None)] * 2


def test_a_table_that_is_cut_alike_tells_the_grid(group):
    """The tokens come as [B, S, C]; what shows the grid is a table, of which this process has its rows."""
    group(4, 1)
    found = sites(Sharded(dist.group.WORLD, 4, 4, 1, table=True), torch.randn(2, 120, 4))
    assert [site.grid for site in found] == [GRID] * 2


def test_a_part_of_a_sequence_is_no_video(group):
    """Tokens cut among four, exchanged between neighbours: half of the video."""
    group(4, 2)
    pair = dist.new_group([2, 3])
    found = sites(Sharded(pair, 2, 4, 2))
    assert all(site.role != "video_self_attention" or site.reason for site in found)


def test_processes_that_are_no_neighbours_hold_no_sequence(group):
    """Tokens cut by rank in the world, exchanged between every other process."""
    group(4, 0)
    pair = dist.new_group([0, 2])
    found = sites(Sharded(pair, 2, 4, 0, cut=rows_of_the_first))
    assert all(site.role != "video_self_attention" for site in found)


def rows_of_the_first(x):
    """Rows of process 0 of four; a collective of all of them tells the passes that there are so many."""
    funcol.all_gather_tensor(x, 0, dist.group.WORLD)
    return x.chunk(4, 1)[0]


def test_another_process_rows_are_no_shard(group):
    """chunk[1] on process 2: whatever that is, it is not what an all-to-all of the ranks puts in order."""
    group(4, 2)
    found = sites(Sharded(dist.group.WORLD, 4, 4, 1))
    assert all(site.role != "video_self_attention" for site in found)


def test_heads_that_are_dealt_one_by_one_are_not_followed(group):
    def dealt(x, group, n):
        b, s, h, d = x.shape
        x = x.reshape(b, s, h // n, n, d).permute(3, 1, 0, 2, 4).contiguous()
        x = funcol.wait_tensor(funcol.all_to_all_single(x.flatten(), None, None, group)).reshape(x.shape)
        return x.flatten(0, 1).permute(1, 0, 2, 3).contiguous()

    group(2, 1)
    found = sites(Sharded(dist.group.WORLD, 2, 2, 1, exchanged=dealt))
    assert all(site.role != "video_self_attention" for site in found)
    assert found[0].reason.code == "context_parallel"


@pytest.mark.parametrize("size", [7, 8, 240, 241])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_rows_of_rank_are_those_of_tensor_split(size, number):
    pieces = torch.arange(size).tensor_split(number)
    for rank, piece in enumerate(pieces):
        start, stop = rows_of_rank(size, Peers(tuple(range(number)), rank))
        assert torch.equal(torch.arange(start, stop), piece)


@pytest.mark.parametrize("text", [40, 24, 80, 7 * 4 - 4])
@pytest.mark.parametrize("rank", range(4))
def test_all_processes_say_the_same(group, text, rank):
    """Also one that has the prompt and nothing else, and ones whose rows begin where the video does."""
    group(4, rank)
    found = sites(Sharded(dist.group.WORLD, 4, 4, rank, text=text))
    said = [(site.role, site.grid, tuple(site.text), site.queries) for site in found]
    assert said == [("video_self_attention", GRID, (text, 0), None)] * 2
