"""Grids read from some rows of position tables: those of the whole table, or none."""

from __future__ import annotations

import random

import pytest
import torch

from dynamicrad_compile.plans.positions import decode_table
from dynamicrad_compile.plans.positions_shard import decode_shard, shows_shard, tells


def places(grid):
    return torch.cartesian_prod(*(torch.arange(float(n)) for n in grid))


def sines(grid):
    """Cosines and sines of two frequencies for each axis, [tokens, 12]."""
    angles = (places(grid)[:, :, None] * torch.tensor([1.0, 0.01])).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], 1)


def halves(grid):
    return sines(grid).bfloat16()


def rotations(grid):
    """As complex numbers are seen, [tokens, 12]: columns of an axis stand apart."""
    angles = (places(grid)[:, :, None] * torch.tensor([1.0, 0.01])).flatten(1)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten(1)


TABLES = [places, sines, halves, rotations]


def shards(n, tokens):
    return [(rank * tokens // n, (rank + 1) * tokens // n) for rank in range(n)]


def fitting(table, start, tokens, frames=3):
    """Slow: all grids of so many tokens of which each varying column of some rows tells one axis, and each is told.

    frames: so many at least must be shown.
    """
    rows, found = torch.arange(start, start + len(table)), []
    varying = [column for column in table.T if bool((column != column[0]).any())]
    for height in range(2, tokens):
        for width in range(2, tokens // height + 1):
            area = height * width
            if tokens % area or rows[-1] // area - rows[0] // area < frames - 1:
                continue
            axes = rows // area, rows // width % height, rows % width
            told = [[_tells(column, axis) for axis in axes] for column in varying]
            depends = all(any(one is not None for one in column) for column in told)
            if depends and all(any(column[d] for column in told) for d in range(3)):
                found.append((tokens // area, height, width))
    return found


def _tells(column, axis):
    """Whether a column has a value for each place of an axis and no two alike; None if it depends on others too."""
    known = {}
    for place, value in zip(axis.tolist(), column.tolist(), strict=True):
        if known.setdefault(place, value) != value:
            return None
    return len(set(known.values())) == len(known)


@pytest.mark.parametrize("table", TABLES)
def test_rows_show_the_grid_of_the_whole_table_or_none(table):
    chance, told = random.Random(0), 0
    for _ in range(150):
        grid = chance.randint(3, 12), chance.randint(2, 9), chance.randint(2, 9)
        tokens = grid[0] * grid[1] * grid[2]
        whole = table(grid)
        for start, stop in shards(chance.randint(2, 8), tokens):
            found = decode_shard(whole[start:stop], start, tokens)
            assert found is None or found.grid == grid == decode_table(whole).grid
            assert found is None or tells(grid, start, stop)
            told += found is not None
    assert told > 100


@pytest.mark.parametrize("table", TABLES)
def test_the_slow_search_finds_no_other_grid(table):
    chance = random.Random(1)
    for _ in range(12):
        grid = chance.randint(4, 8), chance.randint(2, 5), chance.randint(2, 5)
        tokens = grid[0] * grid[1] * grid[2]
        for start, stop in shards(2, tokens):
            rows = table(grid)[start:stop]
            found = decode_shard(rows, start, tokens)
            if found is not None:
                assert fitting(rows, start, tokens) == [grid]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_each_of_some_processes_reads_a_real_grid(world):
    grid = (21, 30, 52)
    for start, stop in shards(world, 21 * 30 * 52):
        assert decode_shard(sines(grid)[start:stop], start, 21 * 30 * 52).grid == grid


@pytest.mark.parametrize("table", TABLES)
def test_rows_that_show_too_little(table):
    whole = table((8, 6, 8))
    assert decode_shard(whole[:96], 0, 384) is None  # two frames
    assert decode_shard(whole[100:140], 100, 384) is None  # less than a frame
    assert decode_shard(whole[96:192], 96, 384) is None
    assert decode_shard(whole[:192], 0, 384).grid == (8, 6, 8)


def test_rows_in_two_frames_may_be_of_two_grids():
    rows = places((6, 6, 4))[36:54]
    assert fitting(rows, 36, 144, frames=2) == [(6, 6, 4), (3, 12, 4)]
    assert decode_shard(rows, 36, 144) is None


def test_a_table_of_times_alone():
    whole = sines((6, 6, 8))[:, [0, 1, 6, 7]]
    assert decode_shard(whole[:144], 0, 288) is None


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("text", [1, 7, 16, 24, 40])
def test_text_in_the_table_is_no_part_of_a_grid(table, text):
    """Unless it is as long as frames are, and rows of it are held by other processes alone."""
    video = table((7, 6, 8))
    others = torch.rand(text, video.shape[1]).to(video.dtype)
    alike = video[:1].expand(text, -1)
    for front in (others, alike):
        for whole in (torch.cat([front, video]), torch.cat([video, front])):
            for start, stop in shards(2, len(whole)):
                found = decode_shard(whole[start:stop], start, len(whole))
                assert found is None


@pytest.mark.parametrize("table", [sines, rotations])
@pytest.mark.parametrize("pictures", [1, 2, 3])
def test_pictures_in_front_are_no_frames(table, pictures):
    """References as large as a frame, whose rows others hold: times begin behind them, and number the frames here."""
    video = table((12, 6, 8))
    whole = torch.cat([torch.rand(48 * pictures, 12), video])
    for start, stop in shards(3, len(whole)):
        rows = whole[start:stop]
        assert decode_shard(rows, start, len(whole)) is None
        found = decode_shard(table((12 + pictures, 6, 8))[start:stop], start, len(whole))
        assert found.grid == (12 + pictures, 6, 8)
        assert not shows_shard(rows, *found)


@pytest.mark.parametrize("table", TABLES)
def test_the_device_tells_a_grid_from_others_of_as_many_tokens(table):
    grids = [(8, 6, 10), (8, 10, 6), (10, 6, 8), (6, 8, 10), (8, 12, 5), (20, 4, 6)]
    for start, stop in shards(2, 480):
        for grid in grids:
            found = decode_shard(table(grid)[start:stop], start, 480)
            assert found.grid == grid
            shown = [bool(shows_shard(table(other)[start:stop], *found)) for other in grids]
            assert shown == [other == grid for other in grids]
            turned = found._replace(grid=(grid[0], grid[2], grid[1]))
            shown = [bool(shows_shard(table(other)[start:stop], *turned)) for other in grids]
            assert shown == [other == turned.grid for other in grids]


def at_times(times):
    numbers = torch.cartesian_prod(torch.tensor(times), torch.arange(6.0), torch.arange(8.0))
    angles = (numbers[:, :, None] * torch.tensor([1.0, 0.01])).flatten(1)
    return numbers, torch.cat([angles.cos(), angles.sin()], 1)


def test_pictures_are_told_from_frames_by_the_times_that_are_shown():
    frames = at_times([float(i) for i in range(10)])
    pictures = at_times([0.0, 4.0, 1.0, 9.0, 2.0, 5.0, 6.0, 7.0, 8.0, 11.0])
    for good, bad in zip(frames, pictures, strict=True):
        found = decode_shard(good[:240], 0, 480)
        assert found.grid == (10, 6, 8)
        assert decode_shard(bad[:240], 0, 480) is None
        assert not shows_shard(bad[:240], *found)


def test_few_numbered_frames_may_be_pictures():
    assert decode_shard(at_times([0.0, 1.0, 2.0, 3.0])[0][:120], 0, 192) is None
    assert decode_shard(at_times([0.0, 1.0, 2.0, 3.0, 4.0])[0][:120], 0, 240).grid == (5, 6, 8)


@pytest.mark.parametrize("values", [torch.zeros(96, 6), torch.arange(96.0)[:, None].repeat(1, 6), torch.randn(96, 6)])
def test_other_tensors_show_nothing(values):
    assert decode_shard(values, 96, 192) is None
    assert decode_shard(values[:3], 96, 192) is None
