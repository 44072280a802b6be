"""Reference pictures beside the frames of a video are told by their times: all read them, and they read all."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, call, drad, masked_dense, relative_error
from support.plain import PLAIN
from support.tokens import only
from torch.nn.functional import scaled_dot_product_attention
from zoo.original_references import reference_behind, references_in_front

SPARSE = {**OPTIONS, "sparsity": 0.6, "regime": "mid", "compensate": 0.0}


def numbers(times, h=6, w=8):
    return torch.cartesian_prod(torch.tensor(times).float(), torch.arange(h).float(), torch.arange(w).float())


def sines(times, h=6, w=8):
    angles = (numbers(times, h, w)[:, :, None] * 0.1 ** torch.arange(4)).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], 1)


def plan_for(grid, before=0, after=0):
    return drad.make_plan(
        "dynamicrad", grid, 16, before, after, sparsity=0.6, regime="mid", compensate=0.0, profile=PLAIN
    )


@pytest.mark.parametrize("case", [reference_behind, references_in_front])
@pytest.mark.parametrize("dynamic", [None, True])
def test_references_in_compiled_blocks(case, dynamic):
    model, kwargs, expected = case()
    for block in model.blocks:
        block.compile(backend="dynamicrad", options=SPARSE, dynamic=dynamic)
    sparse, (eager, _, _) = call(model, kwargs), case()
    (site,) = drad.report(model).replaced
    assert site.grid == expected["grid"]
    assert tuple(site.text_tokens) == (expected["n_text_before"], expected["n_text_after"])
    with masked_dense(plan_for(site.grid, *site.text_tokens)):
        assert relative_error(sparse, call(eager, kwargs)) < 1e-5


class Rotated(torch.nn.Module):
    """Tokens [1, S, 16] rotated by a table of theirs, with text behind them."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, x, table):
        n = len(table)
        y = torch.cat([x[:, :n] * (1 + table.sum(-1)[:, None].cos()), x[:, n:]], 1)
        return scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])


# Times of pictures of one size, and the frames and references among them; None: dense.
TIMES = [
    ((0, 1, 2, 3, 4, 30), (5, 0, 1)),
    ((0, 1, 2, 3, 4, 5), (6, 0, 0)),
    ((30, 0, 1, 2, 3, 4), (5, 1, 0)),
    ((0, 1, 2, 3, 4, -1), None),
    ((0, 1, 2, 30, 3, 4), None),
    ((0, 7, 8, 9, 10, 11), (5, 1, 0)),
    ((7, 8, 9, 10, 11, 50), (5, 0, 1)),
]


@pytest.mark.parametrize("make", [numbers, sines])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(("dynamic", "text"), [(False, 0), (False, 9), (True, 0), (True, 9)])
def test_each_table_of_a_graph_gets_its_plan_or_dense(make, first, dynamic, text):
    """Where sizes are fixed the graph has one plan, for the times that it was compiled with."""
    model, x = Rotated(text), torch.randn(1, 6 * 48 + text, 16)
    compiled = torch.compile(model, backend="dynamicrad", options=SPARSE, dynamic=dynamic)
    for times, shown in [TIMES[first], *TIMES, TIMES[first]]:
        table = make(times)
        with torch.no_grad():
            got, dense = compiled(x, table), model(x, table)
        if shown is None or not (dynamic or shown == TIMES[first][1]):
            torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-5)
        else:
            frames, before, after = shown
            with masked_dense(plan_for((frames, 6, 8), before * 48, after * 48 + text)):
                torch.testing.assert_close(got, model(x, table), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(got, dense, atol=1e-3)
    assert len(drad.report(compiled).graphs) == 1


def test_a_table_that_contradicts_shapes_leaves_the_site_dense():
    """The reference is a frame of the latents; its time says that it is none."""

    def how(m, latents, positions):
        return m.attend(m.tokens(latents) * positions.sum(-1)[:, None].cos())

    latents = torch.randn(1, 3, 6, 12, 16)
    assert only(how, latents, numbers(range(6))).reason is None
    site = only(how, latents, numbers((0, 1, 2, 3, 4, 30)))
    assert (site.role, site.reason.code) == ("video_self_attention", "positions_disagree")
    assert "numbers 0, 1, 2, 3, 4, 30" in site.reason.text
    assert only(how, latents, numbers(range(6), 8, 6)).reason.code == "positions_disagree"
    assert only(how, latents, numbers((0, 1, 2, 3, 4, 30)), grid=(6, 6, 8)).reason is None


class Heard(Rotated):
    """Other tokens read the video, too."""

    def forward(self, x, table, others):
        y = super().forward(x, table)
        return y, scaled_dot_product_attention(others[:, None], y, y)


def test_the_length_of_a_video_that_others_read_stays_a_size():
    model, others = Heard(0), torch.randn(1, 7, 16)
    compiled = torch.compile(model, backend="dynamicrad", options=SPARSE)
    for frames, height in ((5, 6), (7, 6), (7, 12), (6, 10)):
        table = numbers((30, *range(frames)), height)
        x = torch.randn(1, len(table), 16)
        sparse, read = compiled(x, table, others)
        with masked_dense(plan_for((frames, height, 8), 8 * height)):
            dense, wanted = model(x, table, others)
        assert relative_error(sparse, dense) < 1e-5
        assert relative_error(read, wanted) < 1e-5
    assert len(drad.report(compiled).graphs) <= 3
