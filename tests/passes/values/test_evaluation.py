"""Tensors of runs: PyTorch's own operators on them give what they give on all elements."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynamicrad_compile.passes.values.evaluation import Evaluation
from dynamicrad_compile.passes.values.runs import Runs, UnknownValueError, elements

FRAMES, PLACES, CHUNK = 7, 6, 3  # the last chunk of frames is a single one
TOKENS = FRAMES * PLACES
STEP = CHUNK * PLACES


def frames():
    """Frame of each token."""
    return torch.arange(TOKENS) // PLACES


def repeated():
    chunk = torch.arange(FRAMES) // CHUNK
    mask = (chunk.unsqueeze(0) <= chunk.unsqueeze(1)).view(FRAMES, 1, 1, FRAMES, 1, 1)
    return mask.repeat(1, 2, 3, 1, 2, 3).reshape(TOKENS, TOKENS)[None, None]


def compared():
    chunk = frames().div(CHUNK, rounding_mode="floor")
    return torch.where(chunk[:, None] >= chunk[None], 0.0, float("-inf"))


def windowed():
    distance = frames()[:, None] - frames()[None]
    return (distance.abs() <= 2) | (frames() < 1)[None]


def written():
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for i in range(0, TOKENS, STEP):
        mask[i : i + STEP, : i + STEP] = True
    return ~mask


def written_into_views():
    mask = torch.full((TOKENS, TOKENS), -1e9)
    for i in range(0, TOKENS, STEP):
        rows = mask[i : i + STEP]
        rows[:, : i + STEP].fill_(0)
    mask[0].zero_()
    mask.select(1, 3).add_(1)
    return mask.unsqueeze(0).expand(2, TOKENS, TOKENS)


def kronecker():
    return torch.kron(torch.tril(torch.ones(FRAMES, FRAMES)), torch.ones(PLACES, PLACES)).bool()


def interleaved():
    mask = torch.tril(torch.ones(FRAMES, FRAMES)).repeat_interleave(PLACES, 0).repeat_interleave(PLACES, dim=1)
    return mask.masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)


def ends_looked_up():
    ends = torch.zeros(TOKENS, dtype=torch.long)
    for i in range(0, TOKENS, STEP):
        ends[i : i + STEP] = i + STEP
    return torch.arange(TOKENS)[None] < ends[torch.arange(TOKENS)[:, None]]


def table_looked_up():
    table = torch.tril(torch.ones(FRAMES, FRAMES)).bool()
    frame = torch.arange(FRAMES)[:, None, None].expand(FRAMES, 2, 3).flatten()
    return table[frame[:, None], frame[None, :]], table.index_select(0, frame)


def combined():
    chunk = frames() // CHUNK
    mask = chunk[:, None] == chunk[None]
    mask |= (frames() == 0)[None]
    mask ^= (frames() == 6)[:, None]
    bias = torch.zeros(TOKENS, TOKENS)
    bias.masked_fill_(mask.logical_not() & (frames()[None] > 1), float("-inf"))
    return bias, mask, (chunk[:, None] - chunk[None]) // 2


def block_diagonal():
    return torch.block_diag(*(torch.ones(STEP, STEP) for _ in range(3)))


def padded_rows():
    rows = [F.pad(torch.ones(STEP, i), (1, TOKENS - i), value=2.0) for i in range(0, TOKENS, STEP)]
    return torch.cat(rows), torch.stack([row[:5, :5] for row in rows], 1)


def shapes():
    x = frames().float().view(FRAMES, 2, 3)
    return (
        x.permute(2, 0, 1).reshape(3, -1), x.mT.contiguous().view(-1), x[1:6:2], x[..., None, :].squeeze(-2),
        x.flip(0), x[-1, :, 1], x.cumsum(0), x.sum(), x.unbind(1)[1], x.split(4)[1], torch.ones_like(x),
        x.to(torch.int32).to(x), x.repeat(2, 1, 1, 2), x.chunk(2, 0)[1], x.transpose(0, 2).flatten(1), x.view(1, 1, -1),
    )  # fmt: skip


SPELLINGS = [
    repeated, compared, windowed, written, written_into_views, kronecker, interleaved, ends_looked_up, table_looked_up,
    combined, block_diagonal, padded_rows, shapes,
]  # fmt: skip


@pytest.mark.parametrize("make", SPELLINGS)
def test_the_same_as_on_all_elements(make):
    with Evaluation():
        found = make()
    wanted = make()
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    for runs, tensor in pairs:
        assert runs.dtype == tensor.dtype
        assert torch.equal(elements(runs), tensor)


@pytest.mark.parametrize("make", [repeated, written, table_looked_up, padded_rows, shapes])
def test_the_default_device_decides_nothing(make):
    with torch.device("meta"), Evaluation():
        found = make()
    wanted = make()
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    assert all(torch.equal(elements(runs), tensor) for runs, tensor in pairs)


@pytest.mark.parametrize("seed", range(20))
def test_random_reshapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def number(high):
        return int(torch.randint(1, high, (), generator=generator))

    sizes = [number(5) for _ in range(4)]
    runs = [torch.randint(0, 2, (n,), generator=generator) for n in sizes]
    whole = sum(x.view([-1 if d == i else 1 for d in range(4)]) * 2**i for i, x in enumerate(runs))
    order = torch.randperm(4, generator=generator).tolist()
    total = whole.numel()
    first = next(n for n in range(number(total), total + 1) if total % n == 0)

    def change(x):
        return x.permute(order).reshape(first, -1).t().reshape(sizes)

    with Evaluation():
        found = change(whole.clone())
    assert torch.equal(elements(found), change(whole))


def test_a_long_mask_is_few_values():
    with Evaluation():
        chunk = torch.arange(20) // 5
        mask = (chunk[None] <= chunk[:, None]).view(20, 1, 1, 20, 1, 1).repeat(1, 30, 52, 1, 30, 52)
        mask = mask.reshape(31200, 31200)
    assert isinstance(mask, Runs)
    assert mask.shape == (31200, 31200)
    assert mask.values.shape == (4, 4)
    assert mask.ends[0].tolist() == [7800, 15600, 23400, 31200]


def chance():
    return torch.rand(3) > 0.5


def too_many():
    return torch.arange(3000)[:, None] >= torch.arange(3000)[None]


def old_view():
    x = torch.zeros(4, 4)
    view = x[1:]
    x[2] = 1
    return view + 0


def write_into_another_view():
    x = torch.zeros(4, 4)
    x.t()[0] = 1
    return x + 0


def out_argument():
    return torch.add(torch.ones(3), 1, out=torch.zeros(3))


@pytest.mark.parametrize("make", [chance, too_many, old_view, write_into_another_view, out_argument])
def test_what_is_not_known(make):
    with pytest.raises(UnknownValueError), Evaluation():
        make()


def test_large_results_need_a_rule():
    mode = Evaluation()
    mode.few = False
    with pytest.raises(UnknownValueError, match="no rule"), mode:
        torch.eye(10)
