"""Plans whose queries are some of the keys: places, masks, budgets and attention against slow references."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

import dynamicrad_compile as drad
from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.make import make_candidates
from dynamicrad_compile.plans.op import NAMES, dense_table, full_table
from dynamicrad_compile.plans.patterns.dynamicrad import row_budgets, static_ratio_mask
from dynamicrad_compile.plans.prior import CORE, MIN_CORE, Scorer, mass_by_distance
from dynamicrad_compile.plans.prior_boxes import BoxScorer
from dynamicrad_compile.plans.selection import select_blocks
from dynamicrad_compile.plans.table import PlanSpec, RegimeSpec
from dynamicrad_compile.profiles.parameters import Prior, StaticRatio
from dynamicrad_compile.quality.blocks import masked_attention

BOXES = {16: [(4, 2, 2), (1, 4, 4)], 32: [(4, 4, 2), (8, 2, 2)]}


def rectangles(number, seed, boxes=True):
    """Random layouts with ragged shards, whole frames at either end, and the video behind or in front of text."""
    rng = np.random.default_rng(seed)
    for k in range(number):
        block = int(rng.choice([16, 32]))
        grid = tuple(int(x) for x in rng.integers((3, 3, 3), (9, 9, 9)))
        text = tuple(int(x) for x in rng.choice([0, 0, 5, block, 37], size=2))
        box = BOXES[block][k % 2] if boxes and k % 3 else None
        frame, video = grid[1] * grid[2], math.prod(grid)
        if k % 4 == 0:
            start, stop = sorted(int(x) for x in rng.choice(video + sum(text) + 1, size=2, replace=False))
        elif k % 4 == 1:
            start, stop = text[0], text[0] + video
        elif k % 4 == 2:
            start, stop = text[0] + video - int(rng.integers(1, grid[0])) * frame, text[0] + video
        else:
            start, stop = 0, text[0] + int(rng.integers(1, grid[0])) * frame
        yield Layout(grid, block, *text, box=box, queries=(start, stop))


def tokens_of(layout):
    """(tokens of each block of queries, tokens of each block of keys), numbered as in the model's sequence."""
    start, stop = layout.queries or (0, layout.seq_len)
    order, asked = layout.order(), layout.query_order()
    keys = np.arange(layout.seq_len) if order is None else order
    queries = start + (np.arange(stop - start) if asked is None else asked)
    return tuple([x[i : i + layout.block_size] for i in range(0, len(x), layout.block_size)] for x in (queries, keys))


def place_of(layout, tokens):
    """(frame, row, column) of those tokens that are video."""
    video = tokens[(tokens >= layout.text_before) & (tokens < layout.text_before + layout.video_tokens)]
    return np.stack(np.unravel_index(video - layout.text_before, layout.grid), -1)


@pytest.mark.parametrize("layout", list(rectangles(24, seed=0)), ids=str)
def test_places_are_those_of_the_tokens(layout):
    queries, keys = tokens_of(layout)
    assert sorted(np.concatenate(queries)) == list(range(*(layout.queries or (0, layout.seq_len))))
    assert (len(queries), len(keys)) == (layout.num_rows, layout.num_blocks)
    holder = {int(token): block for block, tokens in enumerate(keys) for token in tokens}
    for row, tokens in enumerate(queries):
        held = Counter(holder[int(token)] for token in tokens)
        assert layout.own_blocks()[row] == max(sorted(held), key=held.get)
        assert layout.text_rows()[row] == (len(place_of(layout, tokens)) < len(tokens))
    for places, blocks in ((layout.row_places(), queries), (layout.block_places(), keys)):
        video = [b for b, tokens in enumerate(blocks) if len(place_of(layout, tokens))]
        assert places.block.tolist() == video
        for at, b in enumerate(video):
            found = place_of(layout, blocks[b])
            assert places.count[at] == len(found)
            np.testing.assert_allclose(places.centre[at], found.mean(0))
            assert (places.first[at], places.last[at]) == (found[:, 0].min(), found[:, 0].max())


@pytest.mark.parametrize("layout", list(rectangles(18, seed=1)), ids=str)
def test_rows_keep_text_and_their_own_block_within_one_budget(layout):
    mask = static_ratio_mask(layout, sparsity=0.7)
    text_rows, text = layout.text_rows(), layout.text_blocks()
    assert mask[text_rows].all()
    assert mask[:, text].all()
    assert mask[np.arange(len(mask)), layout.own_blocks()].all()
    counts = mask[~text_rows].sum(1)
    np.testing.assert_array_equal(counts, row_budgets(layout, 0.7))
    if len(counts):
        least = text_rows.sum() * layout.num_blocks + len(counts) * (text.sum() + 1)
        assert abs(mask.sum() - max(0.3 * mask.size, min(least, mask.size))) <= 1


@pytest.mark.parametrize("layout", list(rectangles(12, seed=2, boxes=False)), ids=str)
def test_scores_are_sums_over_tokens(layout):
    prior = Prior(far_width=0.5, adjacent_width=0.75, sink_frames=1)
    rows = np.flatnonzero(~layout.text_rows())
    if not len(rows):
        pytest.skip("only text asks")
    queries, keys = tokens_of(layout)
    frames, height, width = layout.grid
    core = max(MIN_CORE, CORE * prior.decay_factor * math.sqrt(height * width))
    temporal = mass_by_distance(prior, frames)
    expected = np.zeros((len(rows), layout.num_blocks))
    for at, row in enumerate(rows):
        length = len(queries[row])
        for odd in range(1, 8, 2):
            (asking,) = place_of(layout, queries[row][length * odd // 8 : length * odd // 8 + 1])
            for block, tokens in enumerate(keys):
                for frame, y, x in place_of(layout, tokens):
                    dt = min(abs(frame - asking[0]), 1 if frame < prior.sink_frames else frames)
                    stretch = (1.0, prior.adjacent_width, prior.far_width)[min(dt, 2)]
                    square = core**2 + ((y - asking[1]) ** 2 + (x - asking[2]) ** 2) / stretch**2
                    expected[at, block] += temporal[dt] * square**-1.5
    np.testing.assert_allclose(Scorer(layout, prior).scores(rows), expected, rtol=1e-5)


def test_scores_of_whole_frames_in_boxes_go_by_their_own_centres():
    layout = Layout((8, 6, 6), 16, 7, box=(4, 2, 2), queries=(7 + 5 * 36, 7 + 8 * 36))
    rows = np.arange(layout.num_rows)
    scores = BoxScorer(layout, Prior()).scores(rows)
    queries, keys = tokens_of(layout)
    for row in rows:
        near = np.argsort(-scores[row])[:3]
        distance = [
            np.abs(place_of(layout, queries[row]).mean(0) - place_of(layout, tokens).mean(0)).sum() for tokens in keys
        ]
        assert np.mean(np.array(distance)[near]) < np.mean(distance)
        assert layout.own_blocks()[row] in np.argsort(distance)[:8]


@pytest.mark.parametrize("block", [16, 64])
def test_rows_that_begin_where_blocks_do_are_rows_of_the_whole(block):
    whole = Layout((6, 8, 8), block, 10, 3)
    part = Layout((6, 8, 8), block, 10, 3, queries=(2 * block, 5 * block))
    rows = np.flatnonzero(~part.text_rows())
    scorers = Scorer(part, Prior()), Scorer(whole, Prior())
    np.testing.assert_array_equal(scorers[0].scores(rows), scorers[1].scores(rows + 2))
    masks = [drad.make_plan("radial", (6, 8, 8), block, 10, 3, queries=q).block_mask() for q in (part.queries, None)]
    assert torch.equal(masks[0], masks[1][:, :, 2:5])


def test_all_tokens_asking_is_no_rectangle():
    assert Layout((4, 4, 4), 16, 3, queries=(0, 67)) == Layout((4, 4, 4), 16, 3)
    plans = [drad.make_plan("dynamicrad", (4, 4, 4), 16, 3, sparsity=0.5, queries=q) for q in ((0, 67), None)]
    assert torch.equal(plans[0].kv_indices, plans[1].kv_indices)


@pytest.mark.parametrize("queries", [(5, 5), (-1, 4), (0, 68), (8, 3)])
def test_queries_outside_the_sequence(queries):
    with pytest.raises(PlanError, match=r"within 0..67, the sequence of 3 \+ 64 \+ 0 tokens"):
        drad.make_plan("radial", (4, 4, 4), 16, 3, queries=queries)


@pytest.mark.parametrize("queries", [5, (1, 2, 3), (0.5, 3), (True, 3)])
def test_queries_that_are_no_range(queries):
    with pytest.raises(PlanError, match=r"two integers \(start, stop\)"):
        drad.make_plan("radial", (4, 4, 4), 16, 3, queries=queries)


def orders_of(plan):
    """The token of each place of queries and of keys."""
    pairs = ((plan.q_len, plan.query_order), (plan.kv_len, plan.order))
    return [torch.arange(n) if order is None else order[0] for n, order in pairs]


def expected_attention(plan, q, k, v):
    """fp64 attention of a plan, in the model's order."""
    asking, keys = orders_of(plan)
    q, k, v = (x.double()[:, :, order] for x, order in ((q, asking), (k, keys), (v, keys)))
    out = masked_attention(q, k, v, plan.block_mask(), plan.block_q, plan.compensate[0], covariance=plan.covariance)
    return out[:, :, asking.argsort()]


CASES = [
    dict(grid=(5, 7, 9), text_before=5, queries=(5, 320)),
    dict(grid=(5, 7, 9), text_before=5, queries=(5, 320), box=(4, 2, 2)),
    dict(grid=(6, 6, 6), queries=(108, 216), box=(4, 2, 2), compensate=1.0),
    dict(grid=(6, 6, 6), text_after=9, queries=(101, 200), box=(4, 2, 2), compensate=1.0, covariance=True),
    dict(
        grid=(6, 8, 8),
        text_before=20,
        queries=(20 + 4 * 64, 20 + 6 * 64),
        box=(1, 4, 4),
        compensate=0.6,
        covariance=True,
    ),
    dict(grid=(6, 8, 8), queries=(33, 71), compensate=0.6),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_a_rectangle_is_masked_attention(case):
    plan = drad.make_plan("dynamicrad", **{"block_size": 16, "sparsity": 0.6, **case})
    assert (plan.q_len, plan.kv_len) == (case["queries"][1] - case["queries"][0], plan.kv_len)
    assert plan.sparsity > 0.3
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, plan.q_len, 20, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, plan.kv_len, 20, generator=generator, requires_grad=True) for _ in range(2))
    expected = expected_attention(plan, q, *(x.repeat_interleave(2, 1) for x in (k, v)))
    out = drad.block_sparse_attention(q, k, v, plan)
    assert (out - expected).norm() / expected.norm() < 1e-5
    weight = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() / other.norm() < 1e-4


@pytest.mark.parametrize("box", ["raster", (4, 2, 2)])
def test_a_key_mask_is_in_the_order_of_the_model(box):
    plan = drad.make_plan("dynamicrad", (6, 6, 6), 16, text_after=9, queries=(108, 216), box=box, sparsity=0.5)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, n, 16, generator=generator) for n in (plan.q_len, plan.kv_len, plan.kv_len))
    lengths = torch.tensor([plan.kv_len - 7, plan.kv_len])
    out = drad.block_sparse_attention(q, k, v, plan, kv_length=lengths)
    rows, columns = (order.argsort() // 16 for order in orders_of(plan))
    allowed = plan.block_mask()[0, 0][rows][:, columns] & (torch.arange(plan.kv_len) < lengths[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed)
    assert (out - expected).norm() / expected.norm() < 1e-5


def test_a_plan_that_keeps_all_is_dense_attention():
    plan = drad.make_plan("dense", (5, 6, 8), 16, 9, queries=(9, 249))
    q, k = torch.randn(1, 4, 240, 24), torch.randn(1, 2, 249, 24)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert (drad.block_sparse_attention(q, k, k, plan) - expected).abs().max() < 1e-5
    assert plan.sparsity == 0.0


def test_a_block_mask_of_flex_attention_there_and_back():
    plan = drad.make_plan("radial", (5, 6, 8), 16, 9, queries=(105, 249))
    found = drad.BlockPlan.from_block_mask(plan.to_block_mask())
    assert (found.q_len, found.kv_len) == (144, 249)
    assert torch.equal(found.block_mask(), plan.block_mask())


@pytest.mark.parametrize("box", ["raster", (4, 2, 2)])
@pytest.mark.parametrize("rank", ["mass", "error"])
def test_a_selection_keeps_what_is_forced_and_its_share(box, rank):
    found = make_candidates((6, 6, 6), 16, 5, queries=(113, 221), sparsity=0.0, box=box)
    plan = found.plan
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 2, n, 16, generator=generator) for n in (plan.q_len, plan.kv_len))
    chosen = select_blocks(q, k, found, (0.25, 0.25), "ratio", rank=rank)
    kept, own = chosen.block_mask(), torch.from_numpy(Layout((6, 6, 6), 16, 5, queries=(113, 221)).own_blocks())
    assert bool(kept[:, :, :, 0].all())  # text
    if box == "raster":
        assert bool(kept.gather(3, own.expand(1, 2, -1)[..., None]).all())
    allowed = found.kv_forced + ((found.kv_near - found.kv_forced) * 0.25).ceil()
    allowed = allowed + ((plan.kv_counts - found.kv_near) * 0.25).ceil()
    assert torch.equal(chosen.kv_counts, allowed.int().expand(1, 2, -1))
    again = select_blocks(q.flip(0), k.flip(0), found, (0.25, 0.25), "ratio", rank=rank)
    assert torch.equal(again.kv_indices, chosen.kv_indices)


STATIC = RegimeSpec("low", StaticRatio(sparsity=0.6, box=(4, 2, 2)))
RASTER = RegimeSpec("mid", StaticRatio(sparsity=0.6))
CHOSEN = RegimeSpec("high", StaticRatio(sparsity=0.0, box=(1, 4, 4)), "ratio", sparsity=0.7, rank="error")


@pytest.mark.parametrize("queries", [(5, 221), (113, 221), (100, 190)])
@pytest.mark.parametrize("regimes", [(STATIC,), (RASTER,), (CHOSEN,), (STATIC, RASTER, CHOSEN)], ids=len)
def test_a_table_and_the_op_that_makes_it(regimes, queries):
    spec = PlanSpec("dynamicrad", 16, regimes)
    table = spec.build((6, 6, 6), 5, 0, queries)
    q_len = queries[1] - queries[0]
    assert (table.plan.q_len, table.plan.kv_len) == (q_len, 221)
    full = dict(zip(NAMES, full_table(spec, (6, 6, 6), 5, 0, queries), strict=True))
    for name, tensor in table.tensors().items():
        width = tensor.shape[-1] if name == "indices" else None
        assert torch.equal(full[name][..., :width], tensor), name
    assert full["q_order"].shape == (spec.orders, q_len)
    arguments = (torch.empty(0), 6, 6, 6, 5, 221, spec.to_json(), queries[0], q_len)
    for made, known in zip(torch.ops.dynamicrad.make_plan(*arguments), full.values(), strict=True):
        assert torch.equal(made, known)
    torch.library.opcheck(torch.ops.dynamicrad.make_plan.default, arguments)
    for made, known in zip(dense_table(spec, 221, q_len), full.values(), strict=True):
        assert (made.shape, made.dtype) == (known.shape, known.dtype)


def test_a_choice_meets_its_sparsity():
    spec = PlanSpec("dynamicrad", 16, (CHOSEN,))
    for queries in ((113, 221), (5, 221), (60, 180)):
        table = spec.build((6, 6, 6), 5, 0, queries)
        assert table.sparsity == pytest.approx(0.7, abs=0.03), queries
