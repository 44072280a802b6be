"""Masks that hide other keys from some queries than from others: attention of each group without a mask, and exact."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from support.chunked import check_chunks, masked_also
from support.graphs import call, capture, compile_sparse, drad, relative_error, sites_of
from torch import nn
from zoo.chunks import allowed_by
from zoo.more import ZOO_MORE

DIM, HEADS = 32, 2


class Masked(nn.Module):
    """A patch embedding and an attention under the mask `make(grid, tokens)`; text may be in front and behind."""

    def __init__(self, make, before=0, after=0, kv_heads=HEADS):
        super().__init__()
        self.make, self.before, self.after = make, before, after
        self.patch = nn.Conv3d(3, DIM, (1, 2, 2), (1, 2, 2))
        self.q, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.k, self.v = (nn.Linear(DIM, DIM * kv_heads // HEADS) for _ in range(2))
        self.text = nn.Parameter(torch.randn(1, before + after, DIM))
        self.grouped = {"enable_gqa": True} if kv_heads != HEADS else {}

    def forward(self, latents):
        x = self.patch(latents)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        if self.before + self.after:
            text = self.text.expand(x.shape[0], -1, -1)
            x = torch.cat([text[:, : self.before], x, text[:, self.before :]], 1)
        q, k, v = (y(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for y in (self.q, self.k, self.v))
        mask = self.make(grid, x.shape[1])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.grouped)
        return x + self.out(y.transpose(1, 2).flatten(2))


def latents(grid, batch=1):
    f, h, w = grid
    return {"latents": torch.randn(batch, 3, f, 2 * h, 2 * w)}


def chunk_of(grid, size, tokens, before=0):
    """Chunk of each token, -1 for text in front of the video."""
    frame = torch.div(torch.arange(tokens) - before, grid[1] * grid[2], rounding_mode="floor")
    return torch.where(frame < 0, -1, frame.clamp_min(0) // size)


def causal(size, before=0):
    def make(grid, tokens):
        chunk = chunk_of(grid, size, tokens, before)
        return chunk[None, :] <= chunk[:, None]

    return make


@pytest.mark.parametrize("seed", range(6))
def test_random_grids_and_chunks(seed):
    """The last chunk is often shorter than the others."""
    rng = random.Random(seed)
    grid = (rng.randint(4, 9), rng.randint(2, 5), rng.randint(2, 6))
    size = rng.randint(1, min(5, grid[0] - 1))
    model = Masked(causal(size))
    report = check_chunks(model, latents(grid, rng.randint(1, 2)))
    (site,) = report.replaced
    assert site.grid == grid
    assert len(site.chunks) == -(-grid[0] // size)
    assert [chunk.asks[1] for chunk in site.chunks] == [
        min(i + size, grid[0]) * grid[1] * grid[2] for i in range(0, grid[0], size)
    ]
    for chunk in site.chunks:
        frames = chunk.reads[0][1] // (grid[1] * grid[2])
        assert chunk.replaced == (frames >= 3)
        assert chunk.grid == ((frames, *grid[1:]) if frames >= 3 else None)


def as_floats(grid, tokens):
    return torch.where(causal(2)(grid, tokens), 0.0, float("-inf"))[None, None]


def by_batch(grid, tokens):
    return causal(2)(grid, tokens)[None, None].expand(2, HEADS, tokens, tokens)


def filled_in_a_loop(grid, tokens):
    mask, step = torch.full((tokens, tokens), -1e9), 2 * grid[1] * grid[2]
    for start in range(0, tokens, step):
        mask[start : start + step, : start + step] = 0
    return mask[None]


def window_behind_a_sink(grid, tokens):
    chunk = chunk_of(grid, 2, tokens)
    distance = chunk[:, None] - chunk[None, :]
    return (distance >= 0) & ((distance < 2) | (chunk[None, :] == 0))


def apart(grid, tokens):
    chunk = chunk_of(grid, 4, tokens)
    return chunk[:, None] == chunk[None, :]


@pytest.mark.parametrize("make", [as_floats, by_batch, filled_in_a_loop, window_behind_a_sink, apart])
def test_masks(make):
    report = check_chunks(Masked(make), latents((8, 3, 4), batch=2))
    assert report.replaced[0].grid == (8, 3, 4)


def test_keys_in_two_ranges_are_sink_and_window():
    report = check_chunks(Masked(window_behind_a_sink), latents((8, 3, 4)))
    chunk = report.replaced[0].chunks[-1]
    assert chunk.reads == ((0, 24), (48, 96))
    assert (chunk.grid, tuple(chunk.text_tokens), chunk.queries) == ((4, 3, 4), (0, 0), (48, 72))


def test_text_in_front_that_reads_itself():
    report = check_chunks(Masked(causal(3, before=5), before=5), latents((9, 2, 4)))
    text, first, *_ = report.replaced[0].chunks
    assert (text.asks, text.reads, text.replaced) == ((0, 5), ((0, 5),), False)
    assert (first.reads, first.grid, first.queries) == (((0, 29),), (3, 2, 4), (5, 29))


def test_text_behind_that_all_read():
    def make(grid, tokens):
        chunk, last = chunk_of(grid, 3, tokens), torch.arange(tokens) >= tokens - 7
        return (chunk[None, :] <= chunk[:, None]) | last[None] | last[:, None]

    report = check_chunks(Masked(make, after=7), latents((8, 3, 4)))
    site = report.replaced[0]
    assert site.chunks[0].reads == ((0, 36), (96, 103))
    assert tuple(site.text_tokens) == (0, 7)


def test_queries_that_are_some_of_the_keys():
    """The video asks, and reads the prompt in front of it and the chunks up to its own."""

    class Behind(Masked):
        def forward(self, latents):
            x = self.patch(latents)
            grid = tuple(x.shape[2:])
            x = x.flatten(2).transpose(1, 2)
            y = torch.cat([self.text.expand(x.shape[0], -1, -1), x], 1)
            q, k, v = (y[:, None] for y in (self.q(x), self.k(y), self.v(y)))
            mask = causal(2, before=5)(grid, y.shape[1])[5:]
            return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0])

    report = check_chunks(Behind(None, before=5), latents((6, 3, 4), batch=2))
    site = report.replaced[0]
    assert (site.grid, site.queries) == ((6, 3, 4), (5, 77))
    assert [chunk.queries for chunk in site.chunks] == [None, (29, 53), (53, 77)]
    assert [chunk.reads for chunk in site.chunks] == [((0, 29),), ((0, 53),), ((0, 77),)]


def test_heads_of_keys_for_several_of_queries():
    check_chunks(Masked(causal(2), kv_heads=1), latents((6, 3, 4), batch=2))


def test_blocks_that_are_boxes():
    check_chunks(Masked(causal(4)), latents((8, 4, 8)), box=(4, 2, 2))


def test_a_mask_that_hides_nothing_is_none():
    make = lambda grid, tokens: torch.ones(tokens, tokens, dtype=torch.bool)  # noqa: E731
    report = check_chunks(Masked(make), latents((6, 3, 4)))
    (chunk,) = report.replaced[0].chunks
    assert (chunk.grid, chunk.queries) == ((6, 3, 4), None)


def test_written_out_softmax():
    class Written(Masked):
        def forward(self, latents):
            x = self.patch(latents)
            grid = tuple(x.shape[2:])
            x = x.flatten(2).transpose(1, 2)
            q, k, v = (y(x) for y in (self.q, self.k, self.v))
            scores = (q @ k.mT) * DIM**-0.5
            scores = scores.masked_fill(~self.make(grid, x.shape[1]), float("-inf"))
            return scores.softmax(-1) @ v

    model, inputs = Written(causal(2)), latents((6, 3, 4))
    fast = compile_sparse(model, sparsity=0.0)
    assert relative_error(call(fast, inputs), call(model, inputs)) < 1e-5
    assert len(drad.report(fast).replaced[0].chunks) == 3


def test_training():
    model, inputs = Masked(causal(3)), latents((8, 3, 4))
    options = dict(mode="static_ratio", regime="mid", compensate=0.0, sparsity=0.6)
    fast = compile_sparse(model, **options)
    loss = fast(**inputs).square().sum()
    loss.backward()
    got = [p.grad.clone() for p in model.parameters() if p.numel()]
    model.zero_grad()
    report = drad.report(fast)
    with masked_also(allowed_by(report.replaced[0])):
        want = model(**inputs).square().sum()
    assert relative_error(loss.detach(), want.detach()) < 1e-5
    want.backward()
    for a, p in zip(got, [p for p in model.parameters() if p.numel()], strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-4)


def test_another_resolution_compiles_again():
    model = Masked(causal(2))
    fast = compile_sparse(model, sparsity=0.0)
    for grid in [(6, 3, 4), (8, 3, 4), (6, 4, 4), (9, 5, 2)]:
        inputs = latents(grid)
        assert relative_error(call(fast, inputs), call(model, inputs)) < 1e-5
        assert drad.report(fast).replaced[-1].grid == grid


def test_another_batch_does_not():
    model = Masked(causal(2))
    fast = compile_sparse(model, sparsity=0.0)
    for batch in (1, 2, 3, 4, 5):
        inputs = latents((6, 3, 4), batch)
        assert relative_error(call(fast, inputs), call(model, inputs)) < 1e-5
    assert len(drad.report(fast).graphs) <= 2


def test_inductor():
    check_chunks(Masked(causal(3)), latents((8, 3, 4)), inner="inductor")


def test_no_part_is_sparse_where_none_may_be():
    """Chunks of two frames that read nothing else: the original call stays, with its mask."""

    def make(grid, tokens):
        chunk = chunk_of(grid, 2, tokens)
        return chunk[:, None] == chunk[None, :]

    ((context, gm),) = capture(Masked(make), **latents((6, 3, 4)))
    (site,) = context.sites
    assert (site.replaced, site.reason.code) == (False, "few_frames_read")
    (node,) = [n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert node is site.node
    assert "attn_mask" in node.kwargs


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda grid, tokens: torch.ones(tokens, tokens).tril().bool(), "72 times; for these frames at most 8"),
        (lambda grid, tokens: causal(2)(grid, tokens) & (chunk_of(grid, 2, tokens) > 0)[:, None], "all keys from some"),
        (lambda grid, tokens: causal(2)(grid, tokens)[:, :1], "is not a key padding mask"),
        (lambda grid, tokens: causal(2)(grid, tokens).float(), "nothing in the graph shows that it is 0 or -inf"),
    ],
    ids=["causal by token", "no keys", "rows", "a bias"],
)
def test_dense_with_a_reason(make, words):
    (site,) = sites_of(capture(Masked(make), **latents((6, 3, 4))))
    assert words in site.reason.text


@torch.library.custom_op("dynamicrad_test::block_causal", mutates_args=())
def block_causal(frames: int, step: int) -> torch.Tensor:
    chunk = torch.arange(frames) // step
    return chunk[None] <= chunk[:, None]


@block_causal.register_fake
def _(frames: int, step: int) -> torch.Tensor:
    return torch.empty(frames, frames, dtype=torch.bool)


def by_an_operator(grid, tokens):
    return block_causal(tokens, 2 * grid[1] * grid[2])


def by_vmap(grid, tokens):
    chunk, index = chunk_of(grid, 2, tokens), torch.arange(tokens)
    return torch.vmap(lambda i: chunk <= chunk[i])(index)


@pytest.mark.parametrize("make", [by_an_operator, by_vmap])
def test_operations_of_others_are_not_run_beforehand(make):
    model, inputs = Masked(make), latents((6, 3, 4))
    fast = compile_sparse(model, sparsity=0.0)
    assert relative_error(call(fast, inputs), call(model, inputs)) < 1e-5
    (site,) = drad.report(fast).sites
    assert site.code == "mask_differs"


def test_a_long_mask_that_is_causal_by_token_costs_little():
    def make(grid, tokens):
        return torch.ones(tokens, tokens, dtype=torch.bool).tril()

    ((context, _),) = capture(Masked(make), **latents((8, 16, 16)))
    assert context.sites[0].reason.code == "mask_groups"
    assert context.seconds["classify_sites"] < 3.0


def test_a_mask_that_is_an_input_is_not_known():
    class Given(Masked):
        def forward(self, latents, mask):
            self.make = lambda grid, tokens: mask
            return super().forward(latents)

    inputs = latents((6, 3, 4)) | {"mask": causal(2)((6, 3, 4), 72)}
    (site,) = sites_of(capture(Given(None), **inputs))
    assert site.reason.code == "mask_differs"
    assert "compile the whole model" in site.reason.advice


def test_sizes_that_are_marked_stay_dense():
    model, inputs = Masked(causal(2)), latents((6, 3, 4))
    torch._dynamo.mark_dynamic(inputs["latents"], 2)
    fast = compile_sparse(model, sparsity=0.0)
    assert relative_error(call(fast, inputs), call(model, inputs)) < 1e-5
    (site,) = drad.report(fast).sites
    assert site.code == "dynamic_sizes"


def test_skyreels_diffusion_forcing():
    model, kwargs, expected = ZOO_MORE["skyreels_v2_df"]()
    report = check_chunks(model, kwargs, replaced=2)
    for site in report.replaced:
        assert site.grid == expected["grid"]
        assert [chunk.grid for chunk in site.chunks] == [None, (4, 6, 8), (6, 6, 8)]
    assert "288 in 3 chunks" in str(report)
    assert report.replaced[0].to_dict()["chunks"][1]["queries"] == (96, 192)


def test_steps_that_stay_dense_read_what_the_mask_lets_them():
    model, kwargs, _ = ZOO_MORE["skyreels_v2_df"]()
    fast = compile_sparse(model, sparsity=0.6, dense_steps=1)
    assert relative_error(call(fast, kwargs), call(model, kwargs)) < 1e-5
    assert len(drad.report(fast).replaced) == 2


def test_choices_by_content():
    """Measured: what the chunks' calls skip is added up."""
    model, kwargs, _ = ZOO_MORE["skyreels_v2_df"]()
    fast = compile_sparse(model, sparsity=0.5, mode="dynamic_threshold")
    call(fast, kwargs)
    site = drad.report(fast).replaced[0]
    assert site.sparsity == pytest.approx(1 - sum(chunk.flops for chunk in site.chunks) / site.dense_flops, abs=1e-4)
    assert 0.5 < site.sparsity < 0.8
    fast = compile_sparse(model, sparsity=0.0, mode="dynamic_threshold")
    assert relative_error(call(fast, kwargs), call(model, kwargs)) < 1e-5


def test_first_layers_that_stay_dense_are_counted_whole():
    model, kwargs, _ = ZOO_MORE["skyreels_v2_df"]()
    fast = compile_sparse(model, sparsity=0.5, dense_layers=1)
    call(fast, kwargs)
    video = [site for site in drad.report(fast).sites if site.role == "video_self_attention"]
    assert [site.code for site in video] == ["dense_layers", ""]


def test_checkpointed_layers():
    model, kwargs, _ = ZOO_MORE["skyreels_v2_df"]()
    model.enable_gradient_checkpointing()
    fast = compile_sparse(model, sparsity=0.0)
    out, want = (m(**kwargs)[0] for m in (fast, model))
    assert relative_error(out.detach(), want.detach()) < 1e-5
    out.sum().backward()
    assert len(drad.report(fast).replaced) == 2
