"""Advice is followed: it makes the attention sparse, or says that nothing can be done."""

from __future__ import annotations

import pytest
import torch
from support.graphs import OPTIONS, drad
from support.tokens import DIM, GRID, LATENTS, Tokens, check_video, only
from torch.nn.functional import scaled_dot_product_attention as sdpa


def ids(numbers, h=6, w=8):
    """Numbers of picture, row and column, [pictures * h * w, 3]."""
    return torch.cartesian_prod(torch.tensor(numbers).float(), torch.arange(h).float(), torch.arange(w).float())


def packed(m, x):
    return m.attend(x)


def written(m, x, index):
    buffer = torch.zeros(1, 60, DIM)
    buffer[:, index] = m.tokens(x)
    return m.attend(buffer)


def swapped_input(m, x):
    return m.attend(x.permute(0, 3, 1, 2, 4).reshape(1, 60, DIM))


def times(m, x, positions):
    return m.attend(x * positions.sum(-1)[:, None].cos())


@torch.library.custom_op("dynamicrad_test::fill", mutates_args=("buffer",))
def fill(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    buffer.copy_(rows)


def filled(m, x):
    buffer = torch.zeros(1, 60, DIM)
    fill(buffer, m.tokens(x))
    return m.attend(buffer)


def given_back_turned(m, x, *lines):
    return m.attend(x + sum(lines).reshape(60, DIM)).view(1, *GRID, DIM).transpose(1, 2)


def reordered(m, x):
    return m.attend(x.view(1, *GRID, DIM).transpose(1, 2).reshape(1, 60, DIM))


def cut_across(m, x):
    return m.attend((m.tokens(x).view(1, 6, 10, DIM) * 2).view(1, 60, DIM))


def shown_by_tables(m, x, index, back):
    f, h, w = (torch.arange(n).view(n, *(1,) * (2 - d)) for d, n in enumerate(GRID))
    x = m.tokens(x).index_select(1, index) * (f + 2 * h + 3 * w).float().cos().reshape(60, 1)
    return m.attend(x).index_select(1, back).view(1, *GRID, DIM)


ROWS = torch.randn(1, 60, DIM)
LINES = (torch.randn(4, 1, 1, DIM), torch.randn(1, 3, 1, DIM), torch.randn(1, 1, 5, DIM))
FOLLOWED = [
    ("no_grid", packed, (ROWS,), GRID),
    ("only_a_reshape", lambda m, x: m.attend(x) + m.q(x).view(1, 4, 3, 5, DIM).mean((1, 2, 3))[:, None], (ROWS,), GRID),
    ("axes_swapped", swapped_input, (torch.randn(1, 3, 5, 4, DIM),), GRID),
    ("output_order", given_back_turned, (ROWS, *LINES), GRID),
    ("order_not_shown", shown_by_tables, (LATENTS, torch.arange(60), torch.arange(60)), GRID),
    ("reordered", reordered, (ROWS,), GRID),
    ("unknown_write", filled, (LATENTS,), GRID),
    ("reshape_cuts_across", cut_across, (LATENTS,), GRID),
    ("unknown_rows", written, (LATENTS, torch.randperm(60)), GRID),
    ("pictures", times, (torch.randn(1, 192, DIM), ids((0, 10, 20, 30))), (4, 6, 8)),
    ("frames_or_pictures", times, (torch.randn(1, 192, DIM), ids((0, 1, 2, 3))), (4, 6, 8)),
]


@pytest.mark.parametrize(("code", "how", "given", "grid"), FOLLOWED, ids=[case[0] for case in FOLLOWED])
def test_the_advised_grid_works(code, how, given, grid):
    site = only(how, *given)
    assert site.reason.code == code
    assert "`grid`" in site.reason.advice
    site = only(how, *given, grid=grid)
    assert (site.role, site.reason, site.grid) == ("video_self_attention", None, grid)


def disagreeing(m, x, positions):
    return m.attend(m.tokens(x) * positions.sum(-1)[:, None].cos())


def turned(m, x):
    return m.attend(m.tokens(x).flip(1))


MEANT = [
    ("pieces_or_videos", lambda m, x: m.attend(x.flatten(1, 4)), (torch.randn(1, 2, *GRID, DIM),), (8, 3, 5)),
    ("reversed_order", turned, (LATENTS,), GRID),
    ("positions_disagree", disagreeing, (LATENTS, ids((0, 1, 2, 30), 3, 5)), GRID),
]


@pytest.mark.parametrize(("code", "how", "given", "grid"), MEANT, ids=[case[0] for case in MEANT])
def test_a_grid_that_is_meant_works(code, how, given, grid):
    model = Tokens(how)
    with torch.no_grad():
        dense = torch.compile(model, backend="dynamicrad", options=OPTIONS)
        dense(*given)
        (site,) = drad.report(dense).sites
        assert (site.code, site.replaced) == (code, False)
        torch._dynamo.reset()
        meant = torch.compile(model, backend="dynamicrad", options={**OPTIONS, "grid": grid, "override_grid": True})
        meant(*given)
    assert [site.grid for site in drad.report(meant).replaced] == [grid]


def scores(m, x):
    return m.q(x) @ m.k(x).transpose(1, 2)


KEEP = torch.ones(1, 1, 60, dtype=torch.bool)
LOW = float("-inf")
MASKS = [
    (
        "scaled_after_mask",
        lambda s, keep: s.masked_fill(~keep, LOW) * 0.3,
        lambda s, keep: (s * 0.3).masked_fill(~keep, LOW),
    ),
    ("mask_fills_in", lambda s, keep: s.masked_fill(~keep, -1.0), lambda s, keep: s.masked_fill(~keep, LOW)),
    (
        "several_masks",
        lambda s, keep: s.masked_fill(~keep, LOW).masked_fill(~keep.flip(2), LOW),
        lambda s, keep: s.masked_fill(~(keep & keep.flip(2)), LOW),
    ),
]


@pytest.mark.parametrize(("code", "masked", "mended"), MASKS, ids=[case[0] for case in MASKS])
def test_a_mask_that_is_mended_works(code, masked, mended):
    def attention(how):
        def forward(m, latents, keep):
            x = m.tokens(latents)
            return how(scores(m, x), keep).softmax(-1) @ m.v(x)

        return forward

    assert only(attention(masked), LATENTS, KEEP).reason.code == code
    check_video(only(attention(mended), LATENTS, KEEP))


@pytest.mark.parametrize("mask", ["keys", "causal"])
def test_a_mask_of_the_prompt_as_bool_works_and_one_of_the_model_has_no_advice(mask):
    def forward(m, latents, given):
        x = m.tokens(latents)
        return sdpa(m.q(x)[:, None], m.k(x)[:, None], m.v(x)[:, None], attn_mask=given)

    causal = torch.ones(1, 1, 60, 60).tril()
    bias = torch.zeros(1, 1, 1, 60) if mask == "keys" else causal
    dense = only(forward, LATENTS, bias)
    assert dense.reason.code == "additive_mask"
    if mask == "keys":
        check_video(only(forward, LATENTS, bias == 0))
    else:
        assert only(forward, LATENTS, causal.bool()).reason.code == "mask_differs"
    assert "nothing to do if it is a mask of the model itself" in dense.reason.advice
