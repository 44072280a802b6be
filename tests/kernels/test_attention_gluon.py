"""The Gluon kernels, run from their own source in a model of the machine: right numbers, and no order that goes wrong.

Numbers: every case of the Triton kernel, with partitions and copies in random order. Protocol: all orders of a row of
0 to 6 tiles are searched, with 1 to 4 stages, one and two consumers, with and without mean keys. That the model sees
what goes wrong is shown by kernels in which one thing is wrong.
"""

from __future__ import annotations

import inspect
import linecache
import random
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_cases import CASES, Case, check
from support.marks import slow

pytest.importorskip("triton.experimental.gluon")

from support.gluon_cases import forward, of_case, tile_of
from support.gluon_model import ProtocolError
from support.gluon_search import search

from dynamicrad_compile.kernels import attention_gluon_kernels, attention_gluon_parts
from dynamicrad_compile.kernels.attention_gluon import CONSUMERS, why_not
from dynamicrad_compile.kernels.tiles import Tile

QUICK = {
    "even", "ragged_both", "one_block", "cross_lengths", "sub_tiles", "gqa_per_head", "sliced", "dim_40", "mask_random",
    "mask_padding", "mask_all", "bf16", "mean_ragged", "mean_per_sample", "mean_many_blocks", "mean_mask_random",
    "mean_keeps_nothing", "wrong", "mean_wrong",
}  # fmt: skip


def at_random(seed: int):
    """Who goes on, at random."""
    return random.Random(seed).randrange


@pytest.mark.parametrize("kernel", list(CONSUMERS))
@pytest.mark.parametrize("case", [c if c.name in QUICK else slow(c) for c in CASES], ids=[c.name for c in CASES])
def test_model_matches_reference(case: Case, kernel: str):
    a = of_case(case)
    out, lse, _ = forward(a, tile_of(case, kernel), at_random(len(case.name)))
    check(out, lse, tuple(a)[:10], case.dtype)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kernel=st.sampled_from(list(CONSUMERS)),
    stages=st.integers(2, 4),
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    keep=st.sampled_from([0.0, 0.3, 0.9]),
    mask=st.sampled_from(["none", "random", "padding"]),
    compensate=st.sampled_from([None, (0.6,)]),
    heads=st.sampled_from([(1, 1), (2, 1)]),
)
def test_any_shape_in_any_order(seed, kernel, stages, lengths, keep, mask, compensate, heads):
    case = Case(
        f"random_{seed}", q_len=lengths[0], kv_len=lengths[1], dim=16, block_q=32, block_kv=16, keep=keep, mask=mask,
        compensate=compensate, heads=heads[0], kv_heads=heads[1], plan_heads=heads[0],
    )  # fmt: skip
    a = of_case(case)
    out, lse, _ = forward(a, tile_of(case, kernel, stages), at_random(seed))
    check(out, lse, tuple(a)[:10], case.dtype)


@pytest.mark.parametrize("kernel", list(CONSUMERS))
def test_whoever_is_first_the_bits_are_the_same(kernel: str):
    case = Case("orders", q_len=64, kv_len=203, dim=16, block_kv=16, compensate=(1.0,))
    a = of_case(case)
    orders = [at_random(1), lambda n: 0, lambda n: n - 1, lambda n: n // 2]  # the first: consumers; the last: copies
    results = [forward(a, tile_of(case, kernel), choose) for choose in orders]
    for out, lse, traces in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
        assert [[[o[0] for o in t] for t in p] for p in traces] == [
            [[o[0] for o in t] for t in p] for p in results[0][2]
        ]


def traces_of(counts: tuple[int, ...], means: bool, kernel: str, stages: int, source=None):
    """Traces of a program that takes items of so many tiles, and with `means` one of mean keys more, each."""
    rows = len(counts)
    case = Case("rows", heads=1, kv_heads=1, q_len=16 * rows, kv_len=16 * 7, dim=16, block_q=16, block_kv=16,
                compensate=(1.0,) if means else None)  # fmt: skip
    a = of_case(case)
    a = a._replace(
        kv_counts=torch.tensor([[counts]], dtype=torch.int32),
        kv_indices=torch.arange(6, dtype=torch.int32).expand(1, 1, rows, 6).contiguous(),
    )
    (traces,) = forward(a, tile_of(case, kernel, stages), at_random(rows), source, programs=1)[2]
    return traces


@pytest.mark.parametrize("means", [False, True], ids=["plain", "means"])
@pytest.mark.parametrize("stages", [1, 2, slow(3), slow(4)])
@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("kernel", list(CONSUMERS))
def test_no_order_of_operations_goes_wrong(kernel: str, tiles: int, stages: int, means: bool):
    states = search(traces_of((tiles, 0, tiles // 2), means, kernel, stages))
    assert states > (50 * tiles if stages > 1 else 0)


@pytest.mark.parametrize("kernel", list(CONSUMERS))
def test_no_order_of_many_short_items_goes_wrong(kernel: str):
    assert search(traces_of((1, 1, 0, 1, 1), False, kernel, 3)) > 500


K, V = "rings.k_empty.index(tile % sizes.STAGES)", "rings.v_empty.index((tile - 1) % sizes.STAGES)"
WRONG = {
    "tile_given_back_before_the_product_is_done": (
        f"b_s = warpgroup_mma_wait(1, deps=[b_s])\n                mbarrier.arrive({K}, count=1)",
        f"mbarrier.arrive({K}, count=1)\n                b_s = warpgroup_mma_wait(1, deps=[b_s])",
    ),
    "tile_never_given_back": (f"mbarrier.arrive({V}, count=1)", "pass"),
    "copy_without_waiting": ("mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)", "pass"),
    "wrong_parity_of_empty": ("((tile // STAGES) & 1) ^ 1)", "(tile // STAGES) & 1)"),
    "product_without_waiting": ("mbarrier.wait(rings.v_full.index(stage), (tile // sizes.STAGES) & 1)", "pass"),
    "bytes_not_announced": ("expect(full.index(stage), x.block_type.nbytes)", "expect(full.index(stage), 0)"),
    "softmax_before_the_wait": ("b_s = warpgroup_mma_wait(1, deps=[b_s])", "pass"),
    "output_scaled_before_the_wait": (
        f"b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])\n                mbarrier.arrive({V}",
        f"mbarrier.arrive({V}",
    ),
    "probabilities_not_kept": (
        "b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])",
        "b_acc = warpgroup_mma_wait(0, deps=[b_acc])",
    ),
    "turn_not_passed_on": ("mbarrier.arrive(turn.index(1 - I), count=1)", "pass"),
    "nobody_has_the_first_turn": ("(tile & 1) ^ (1 - I)", "(tile & 1)"),
    "queries_never_given_back": ("mbarrier.arrive(rings.q_empty.index(slot), count=1)", "pass"),
    "queries_fetched_too_early": ("mbarrier.wait(rings.q_empty.index(slot), ((rows >> 1) & 1) ^ 1)", "pass"),
    "an_empty_item_counts_as_one": (
        "        if n_means + n_tiles > 0:\n            mbarrier.arrive(rings.q_empty",
        "        if True:\n            mbarrier.arrive(rings.q_empty",
    ),
    "one_consumer_gives_back_for_both": (
        "init(rings.k_empty.index(i), count=CONSUMERS)",
        "init(rings.k_empty.index(i), count=1)",
    ),
}


def changed(right: str, wrong: str) -> Any:
    """The kernel with one thing replaced in its source."""
    made: dict[str, types.ModuleType] = {}
    found = 0
    for module in (attention_gluon_parts, attention_gluon_kernels):
        text = inspect.getsource(module)
        found += right in text
        text = text.replace(right, wrong).replace("from .attention_gluon_parts import", "from wrong_parts import")
        name = "wrong_parts" if module is attention_gluon_parts else "wrong_kernels"
        made[name] = types.ModuleType(name)
        made[name].__package__ = module.__package__
        lines = text.splitlines(keepends=True)
        linecache.cache[f"{name}.py"] = (len(text), None, lines, f"{name}.py")  # where Triton looks for the source
        sys.modules[name] = made[name]
        try:
            exec(compile(text, f"{name}.py", "exec"), made[name].__dict__)
        finally:
            if name == "wrong_kernels":
                del sys.modules["wrong_parts"], sys.modules["wrong_kernels"]
    assert found, "the kernel no longer has this line"
    return made["wrong_kernels"]._block_sparse_forward_gluon


@pytest.mark.parametrize("what", list(WRONG))
def test_the_model_sees_what_is_wrong(what: str):
    kernel = changed(*WRONG[what])

    def run() -> None:
        search(traces_of((6, 0, 3), True, "gluon_pingpong", 2, kernel))
        search(traces_of((1, 1, 0, 1), False, "gluon_pingpong", 4, kernel))

    with pytest.raises((ProtocolError, AssertionError)):
        run()


def test_reasons_for_another_kernel():
    tile = Tile(128, 128, 8, 2, "gluon")
    case = Case("reasons", block_q=128, block_kv=128, dim=128, dtype=torch.bfloat16)
    a = of_case(case)
    assert why_not(a, tile) is None
    assert why_not(a._replace(q=a.q.float()), tile) == "they multiply fp16 and bf16"
    assert why_not(a._replace(qk_int8=True), tile) == "they multiply fp16 and bf16"
    assert why_not(a._replace(block_kv=64), tile) == "blocks of 128 x 64 are not whole tiles of 128 x 128"
    assert why_not(a._replace(q=a.q[..., :24]), tile) == "head_dim must be 33 to 128"
