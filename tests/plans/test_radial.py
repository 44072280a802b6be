"""The radial planner equals the published masks where those are sound and is sound everywhere else."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.plans.patterns import radial
from dynamicrad_compile.plans.patterns.radial import radial_mask
from dynamicrad_compile.profiles.parameters import Radial

GOLDEN = Path(__file__).parents[1] / "data" / "radial_wan_small.npz"


def golden_cases():
    """(case, mask) of each mask that the published code produced (mit-han-lab/radial-attention @72788d4)."""
    with np.load(GOLDEN) as archive:
        for case in json.loads(str(archive["meta"]))["cases"]:
            if case["error"] is None:
                n = case["s"] // case["bs"]
                yield case, np.unpackbits(archive[case["key"]])[: n * n].reshape(n, n).astype(bool)


ALIGNED = [(c, m) for c, m in golden_cases() if c["tpf"] % c["bs"] == 0]
RAGGED = [(c, m) for c, m in golden_cases() if c["tpf"] % c["bs"] != 0]


def case_id(value):
    return f"{value['F']}x{value['tpf']}-b{value['bs']}-g{value['df']}" if isinstance(value, dict) else ""


def our_mask(case):
    plan = make_plan("radial", (case["F"], 1, case["tpf"]), case["bs"], decay_factor=case["df"])
    return plan.block_mask()[0, 0].numpy()


def frame_pair_tokens(i, j, tokens, block, decay, sink):
    """bool [T, T]: which tokens of frame j each token of frame i may read, by the published formula."""
    if j < sink:
        return np.ones((tokens, tokens), dtype=bool)
    distance = abs(i - j)
    length = 2.0 ** tokens.bit_length() / 2.0 ** distance.bit_length()
    if length < 128 and distance % int(128 / length) != 0:
        return np.zeros((tokens, tokens), dtype=bool)
    window = np.float32(tokens if distance <= 1 else max(length * decay, block))
    place = np.arange(tokens)
    return np.abs(place[:, None] - place[None, :]).astype(np.float32) <= window


def keeps_tile(tile):
    """The published shrinking rule on one tile of tokens, in exact integers."""
    share = tile.sum(axis=0)
    return 5 * (3 * share > tile.shape[0]).sum() > 3 * (share > 0).sum()


def slow_mask(layout, decay, sink):
    """Radial mask by token masks and loops: each frame pair and each run in one block shrunk alone."""
    tokens, block = layout.tokens_per_frame, layout.block_size
    start, stop = layout.queries or (0, layout.seq_len)
    position = layout.text_before + np.arange(layout.video_tokens).reshape(layout.frames, tokens)
    mask = np.zeros((-(-(stop - start) // block), -(-layout.seq_len // block)), dtype=bool)
    asked = (position >= start) & (position < stop)
    for i in range(layout.frames):
        rows = np.where(asked[i], (position[i] - start) // block, -1)
        for j in range(layout.frames):
            allowed = frame_pair_tokens(i, j, tokens, block, decay, sink)
            for row in set(rows) - {-1}:
                for column in np.unique(position[j] // block):
                    tile = allowed[rows == row][:, position[j] // block == column]
                    mask[row, column] |= keeps_tile(tile)
    video = range(layout.text_before, layout.text_before + layout.video_tokens)
    for row, first in enumerate(range(start, stop, block)):
        inside = range(first, min(first + block, stop))
        held = Counter(token // block for token in inside)
        mask[row, max(sorted(held), key=held.get)] = True
        mask[row] |= any(token not in video for token in inside)
    for column in range(mask.shape[1]):
        inside = range(column * block, min((column + 1) * block, layout.seq_len))
        mask[:, column] |= any(token not in video for token in inside)
    return mask


@pytest.mark.parametrize(("case", "published"), ALIGNED, ids=case_id)
def test_equals_published_mask_where_frames_are_whole_blocks(case, published):
    np.testing.assert_array_equal(our_mask(case), published)


@pytest.mark.parametrize(("case", "published"), RAGGED, ids=case_id)
def test_mends_published_mask_on_ragged_grids(case, published):
    mask = our_mask(case)
    assert mask.shape[0] == -(-case["F"] * case["tpf"] // case["bs"])
    assert mask.diagonal().all()
    assert mask.any(axis=1).all()
    # The sink reaches every row, the tail included.
    assert mask[:, 0].all()
    # Nothing that the published code keeps is lost. (Behind the last whole block it keeps all or has no row.)
    whole = case["F"] * case["tpf"] // case["bs"]
    assert mask[:whole, :whole][published[:whole, :whole]].all()


def test_random_aligned_grids_equal_token_level_formula():
    rng = np.random.default_rng(0)
    for _ in range(40):
        block = int(rng.choice([16, 32, 64, 128]))
        frames = int(rng.integers(1, 10))
        tokens = block * int(rng.integers(1, max(2, 512 // block)))
        decay, sink = float(rng.choice([0.2, 0.37, 0.8, 1.0, 1.7, 3.0])), int(rng.integers(0, 2))
        layout = Layout((frames, 1, tokens), block)
        np.testing.assert_array_equal(
            radial_mask(layout, Radial(decay_factor=decay, sink_frames=sink)),
            slow_mask(layout, decay, sink),
            err_msg=f"{frames}x{tokens} block {block} decay {decay} sink {sink}",
        )


def test_random_ragged_grids_equal_token_level_segments():
    rng = np.random.default_rng(1)
    for _ in range(40):
        block = int(rng.choice([16, 32, 64]))
        grid = tuple(int(x) for x in rng.integers(1, (9, 17, 19)))
        text = tuple(int(x) for x in rng.choice([0, 0, 5, block, 77], size=2))
        decay, sink = float(rng.choice([0.2, 0.5, 1.0, 2.5])), int(rng.integers(0, 3))
        whole = Layout(grid, block, *text)
        start, stop = sorted(int(x) for x in rng.choice(whole.seq_len + 1, size=2, replace=False))
        for layout in (whole, Layout(grid, block, *text, queries=(start, stop))):
            np.testing.assert_array_equal(
                radial_mask(layout, Radial(decay_factor=decay, sink_frames=sink)),
                slow_mask(layout, decay, sink),
                err_msg=f"{layout} decay {decay} sink {sink}",
            )


def test_text_behind_whole_blocks_follows_published_rule():
    # Published: every block row and column from floor(N / B) on is kept; the video part is as without text.
    video = make_plan("radial", (6, 12, 16), 64, sink_frames=0).block_mask()[0, 0].numpy()
    mask = make_plan("radial", (6, 12, 16), 64, text_after=100, sink_frames=0).block_mask()[0, 0].numpy()
    assert mask.shape == (20, 20)
    np.testing.assert_array_equal(mask[:18, :18], video)
    assert mask[18:].all()
    assert mask[:, 18:].all()


@pytest.mark.parametrize("text", [(64, 0), (0, 64), (128, 64)], ids=["before", "after", "both"])
def test_whole_blocks_of_text_do_not_change_the_video_part(text):
    video = make_plan("radial", (5, 8, 24), 64).block_mask()[0, 0]
    mask = make_plan("radial", (5, 8, 24), 64, *text).block_mask()[0, 0]
    first = text[0] // 64
    part = slice(first, first + video.shape[0])
    assert mask[part, part].equal(video)
    assert mask[:first].all()
    assert mask[part.stop :].all()


def test_block_with_one_text_token_is_kept_whole():
    plan = make_plan("radial", (7, 11, 13), 32, text_before=33, text_after=1)
    mask = plan.block_mask()[0, 0]
    assert plan.q_len == 33 + 7 * 11 * 13 + 1
    for block in (0, 1, mask.shape[0] - 1):
        assert mask[block].all()
        assert mask[:, block].all()


def test_chunks_do_not_change_the_mask(monkeypatch):
    layout = Layout((9, 13, 17), 32, 19, 3)
    whole = radial_mask(layout)
    monkeypatch.setattr(radial, "CHUNK_ELEMENTS", 1)
    np.testing.assert_array_equal(radial_mask(layout), whole)


@pytest.mark.parametrize(
    ("grid", "block_size", "params", "kept"),
    [
        ((18, 48, 80), 128, {"decay_factor": 0.2}, 83728),
        ((20, 48, 80), 64, {"decay_factor": 0.8, "sink_frames": 0}, 447536),
    ],
    ids=["wan21-768p-69-frames", "wan22-768p-77-frames-no-sink"],
)
def test_full_size_grids_keep_as_many_blocks_as_the_token_level_formula(grid, block_size, params, kept):
    # The numbers are from the token-level formula above, which equalled the planner block for block.
    assert int(make_plan("radial", grid, block_size, **params).kv_counts.sum()) == kept


def test_one_token_is_one_block():
    assert make_plan("radial", (1, 1, 1), 16).block_mask().tolist() == [[[[True]]]]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"decay_factor": 0.0}, r"decay_factor must be in 0.001..1000, got 0.0"),
        ({"decay_factor": float("nan")}, "decay_factor must be a number"),
        ({"decay_factor": "1"}, "decay_factor must be a number"),
        ({"sink_frames": -1}, "sink_frames must be an integer of at least 0, got -1"),
        ({"sink_frames": 0.5}, "sink_frames must be an integer"),
        ({"decay_facto": 1.0}, "unknown parameter 'decay_facto'.*Did you mean 'decay_factor'"),
    ],
    ids=["zero", "nan", "text", "negative", "fraction", "typo"],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(PlanError, match=message):
        make_plan("radial", (2, 4, 4), 16, **params)
