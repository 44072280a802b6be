"""The ops search_blocks and search_blocks_ on CPU: the right blocks and recalls, state kept, loud about wrong calls."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support.search_cases import CASES, RANKS, build, case_of, check
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dynamicrad_compile.errors import OptionsError, PlanError
from dynamicrad_compile.kernels import search_cpu
from dynamicrad_compile.kernels.search_arguments import Search, SearchState, budget, sparsities
from dynamicrad_compile.kernels.search_arguments import with_search_state as in_order
from dynamicrad_compile.kernels.search_op import cost
from dynamicrad_compile.kernels.search_reference import search_blocks_reference

OP = torch.ops.dynamicrad.search_blocks
OP_STATE = torch.ops.dynamicrad.search_blocks_


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, rank: str):
    args = build(case, rank)
    check(OP(*args), args, search_cpu.scores(Search(*args)))


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_match_the_reference_from_end_to_end(seed: int):
    """In fp32, whose masses differ by more than their errors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*of):
        return of[int(torch.randint(len(of), (1,), generator=generator))]

    kv_heads, rep, batch, dim = draw(1, 2, 3), draw(1, 2), draw(1, 2), draw(3, 17, 40)
    q_len, kv_len, block_q, block_kv = draw(30, 77, 129), draw(45, 131), draw(16, 24), draw(8, 16)
    q = torch.randn(batch, kv_heads * rep, q_len, dim, generator=generator)
    k = torch.randn(batch, kv_heads, kv_len, dim, generator=generator)
    mask = draw(None, torch.rand(batch, kv_len, generator=generator) < 0.7)
    scores = dim**-0.5 * q @ k.repeat_interleave(rep, 1).mT
    lse = scores.logsumexp(-1) + 0.1 * torch.randn(q.shape[:3], generator=generator)
    n_q, n_kv = -(-q_len // block_q), -(-kv_len // block_kv)
    shape = (draw(1, batch), draw(1, kv_heads * rep), n_q)
    indices = torch.rand(*shape, n_kv, generator=generator).argsort(-1)[..., :3].int()
    counts = torch.randint(4, shape, generator=generator, dtype=torch.int32)
    counts[..., 0] = draw(0, n_kv)
    args = (q, k, lse, counts, indices, draw(0.3, 0.6, 0.85), draw(0.0, 0.3, 0.6, 1.0), None, block_q, block_kv, mask)
    for got, want in zip(OP(*args), search_blocks_reference(*args), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-6)


def heads_of(shares: list[list[float]], **changes) -> tuple:
    """Arguments for heads of one query, whose keys (blocks of one) have these shares."""
    k = torch.tensor(shares).log()[None, ..., None]
    q = torch.ones(1, len(shares), 1, 1)
    table = torch.zeros(1, 1, 1, dtype=torch.int32)
    given = {"q": q, "k": k, "lse": torch.zeros(1, len(shares), 1), "kv_counts": table, "kv_indices": table[..., None]}
    given |= {"sparsity": 0.5, "recall_threshold": 1.0, "scale": 1.0, "block_q": 1, "block_kv": 1} | changes
    return tuple(given[name] for name in Search._fields if name in given)


def test_sparsity_moves_from_heads_with_low_recall_to_those_with_high():
    shares = [[0.4, 0.3, 0.2, 0.1], [0.7, 0.2, 0.06, 0.04], [0.3, 0.29, 0.21, 0.2], [0.32, 0.28, 0.22, 0.18]]
    counts, _, recall = OP(*heads_of(shares))
    assert counts.flatten().tolist() == [2, 2, 2, 2]
    torch.testing.assert_close(recall, torch.tensor([[0.7, 0.9, 0.59, 0.6]]))
    counts, indices, recall = OP(*heads_of(shares, recall_threshold=0.8))  # one head is above
    assert counts.flatten().tolist() == [2, 1, 3, 2]
    assert indices[0, 2].tolist() == [[0, 1, 2, 0]]
    torch.testing.assert_close(recall, torch.tensor([[0.7, 0.7, 0.8, 0.6]]))
    counts, _, _ = OP(*heads_of(shares, recall_threshold=0.0))  # all are, and half of them is the most
    assert counts.flatten().tolist() == [1, 1, 3, 3]


def test_of_equal_heads_the_lower_one_gets_sparser():
    counts, _, _ = OP(*heads_of([[0.4, 0.3, 0.2, 0.1]] * 5, recall_threshold=0.0))
    assert counts.flatten().tolist() == [1, 1, 2, 3, 3]


def test_of_equal_blocks_the_earlier_is_kept():
    args = list(build(case_of("equal_scores_one_head"), "mass"))
    args[3] = torch.zeros_like(args[3])
    counts, indices, _ = OP(*args)
    n_q, n_kv = counts.shape[2], indices.shape[3]
    best = 1 if n_q > 1 else 0  # of each row one
    assert int(counts.sum()) == round(n_q * n_kv / 2)
    assert indices[..., 0].eq(0).all()
    assert int(counts[0, 0, 0]) >= int(counts[0, 0, -1]) >= best


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 1 / 3, 0.4, 0.8, 0.95])
def test_the_mean_sparsity_stays(sparsity: float):
    lower, upper = sparsities(sparsity)
    assert 0 <= lower <= sparsity <= upper < 1
    assert lower + upper == pytest.approx(2 * sparsity)
    args = list(build(case_of("gqa"), "mass"))
    args[3], args[5], args[6] = torch.zeros_like(args[3]), sparsity, 0.0
    counts, indices, _ = OP(*args)
    n_q, n_kv = indices.shape[2:]
    least = n_q  # the best block of each row
    budgets = sorted(max(least, budget(x, n_q, n_kv)) for x in [lower] * 2 + [upper] * 2)
    for sample in counts.sum(-1):
        assert sorted(sample.tolist()) == budgets


def test_blocks_of_equal_keys_have_no_error():
    args = list(build(case_of("even"), "error"))
    args[1] = args[1][:, :, ::32].repeat_interleave(32, 2).contiguous()
    mass, score = search_cpu.scores(Search(*args))
    assert float((score / mass).max()) < 1e-5


@pytest.mark.parametrize("rank", RANKS)
def test_three_threads_give_the_same(rank: str):
    args, before = build(case_of("gqa"), rank), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(OP(*args), args, search_cpu.scores(Search(*args)))
    finally:
        torch.set_num_threads(before)


# ---- state


def with_state(args: tuple, refresh: bool) -> tuple:
    q, counts = args[:4:3]
    n_kv = -(-args[1].shape[2] // args[9])
    shape = (*q.shape[:2], counts.shape[2])
    state = torch.full(shape, 5).int(), torch.full((*shape, n_kv), 6).int(), torch.full(shape[:2], 7.0)
    return in_order(args, (*state, torch.tensor([refresh])))


@pytest.mark.parametrize("rank", RANKS)
def test_refresh_writes_the_state(rank: str):
    args = build(case_of("gqa"), rank)
    full = with_state(args, True)
    assert OP_STATE(*full) is None
    for got, want in zip(full[10:13], OP(*args), strict=True):
        assert torch.equal(got, want)


def test_without_refresh_nothing_is_computed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search_cpu, "scores", None)
    full = with_state(build(case_of("gqa"), "mass"), False)
    OP_STATE(*full)
    assert [float(x.min()) for x in full[10:13]] == [float(x.max()) for x in full[10:13]] == [5, 6, 7]


# ---- tracing


@pytest.mark.parametrize(
    ("name", "rank"), [("ragged", "mass"), ("gqa", "error"), ("permuted", "error"), ("mask_random", "mass")]
)
def test_opcheck(name: str, rank: str):
    args = build(case_of(name), rank)
    for op in (OP.default, torch.ops.dynamicrad.search_blocks_cpu.default):
        torch.library.opcheck(op, args)
    for op in (OP_STATE.default, torch.ops.dynamicrad.search_blocks_cpu_.default):
        torch.library.opcheck(op, with_state(args, True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_state_in_one_compiled_graph(backend: str):
    q, k, lse, *rest = build(case_of("gqa"), "mass")
    state = with_state((q, k, lse, *rest), True)[10:14]
    refresh = state[3]

    def step(q: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        OP_STATE(*in_order((q * 2, k, lse, *rest), state))
        return torch.ops.dynamicrad.block_sparse_attention(q, k, k, *state[:2], *rest[4:7])[0]

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for queries, flag in ((q, True), (-q, False), (-q, True)):
        refresh.fill_(flag)
        before = [x.clone() for x in state[:3]]
        compiled(queries, lse)
        for got, want in zip(state, OP(queries * 2, k, lse, *rest) if flag else before, strict=False):
            assert torch.equal(got, want)
    assert counter.frame_count == 1


def test_vmap():
    q, k, *rest = build(case_of("ragged"), "error")
    got = torch.vmap(lambda x: OP(x, k, *rest))(torch.stack((q, -q)))
    for own, want in zip(zip(*got, strict=True), (OP(q, k, *rest), OP(-q, k, *rest)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(own, want, strict=True))


@pytest.mark.parametrize("name", ["permuted", "gqa"])
def test_fake_output_is_that_of_the_op(name: str):
    args = build(case_of(name), "mass")
    with FakeTensorMode() as mode:
        fakes = OP(*[mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args])
    for fake, real in zip(fakes, OP(*args), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


# ---- cost


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dim", [64, 128])
def test_costs_little_more_than_half_of_dense_attention(dim: int, rank: str):
    """32,768 tokens; H200: 600 TFLOP/s in dense attention, 4.8 TB/s."""
    spent = cost(1, 40, 40, 32768, 32768, dim, 128, 128, rank=rank)
    dense = 4 * 32768**2 * dim * 40
    assert 0.5 < spent.flops / dense < 0.51
    assert spent.bytes / 4.8e12 < 0.02 * dense / 600e12


@pytest.mark.parametrize("rank", RANKS)
def test_flops_are_those_of_cost(rank: str):
    args = build(case_of("gqa"), rank)
    q, k = args[:2]
    expected = cost(*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], 32, 32, rank=rank).flops
    named = dict(zip(in_order(Search._fields, SearchState._fields), with_state(args, True), strict=True))
    q, k = named.pop("q"), named.pop("k")
    for call in (lambda: OP(*args), lambda: OP_STATE(*with_state(args, True)), lambda: OP_STATE(q, k, **named)):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == expected


# ---- errors


STATE = {
    "state_counts": torch.zeros(2, 4, 2, dtype=torch.int32),
    "state_indices": torch.zeros(2, 4, 2, 2, dtype=torch.int32),
    "state_recall": torch.zeros(2, 4),
    "refresh": torch.tensor([True]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 64, 16)}, r"expected q \[B, H, Sq, D\]"),
        ({"k": torch.zeros(2, 3, 64, 16)}, "Hkv must divide H"),
        ({"k": torch.zeros(2, 4, 0, 16)}, "there must be a key to search for"),
        ({"lse": torch.zeros(2, 4, 63)}, "lse must have q's batch, heads and length"),
        ({"sparsity": 1.5}, "sparsity must be in 0..1, got 1.5"),
        ({"sparsity": float("nan")}, "sparsity must be in 0..1, got nan"),
        ({"recall_threshold": -0.1}, "recall_threshold must be at least 0"),
        ({"rank": "mas"}, "rank must be one of mass, error, got 'mas'"),
        ({"kv_counts": torch.zeros(1, 1, 3, dtype=torch.int32)}, "kv_counts and kv_indices disagree"),
        ({"kv_mask": torch.ones(2, 60, dtype=torch.bool)}, "kv_mask must cover every key"),
        (STATE | {"state_counts": torch.zeros(2, 4, 3).int()}, r"expected state_counts int32 \[2, 4, 2\]"),
        (STATE | {"state_indices": torch.zeros(2, 4, 2, 1).int()}, r"state_indices int32 \[2, 4, 2, 2\]"),
        (STATE | {"state_recall": torch.zeros(2, 4).double()}, r"expected state_recall float32 \[2, 4\]"),
        (STATE | {"state_recall": torch.zeros(2, 3)}, r"expected state_recall float32 \[2, 4\]"),
        (STATE | {"state_recall": torch.zeros(4, 2).mT}, "contiguous"),
        (STATE | {"refresh": torch.ones(1)}, r"expected refresh bool \[1\]"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_arguments(changes, message):
    table = torch.zeros(1, 1, 2, dtype=torch.int32)
    args = {"q": torch.zeros(2, 4, 64, 16), "k": torch.zeros(2, 4, 64, 16), "lse": torch.zeros(2, 4, 64)}
    args |= {"kv_counts": table, "kv_indices": table[..., None], "sparsity": 0.5, "recall_threshold": 1.0}
    args |= {"scale": None, "block_q": 32, "block_kv": 32} | changes
    with pytest.raises((PlanError, OptionsError), match=message):
        (OP_STATE if "refresh" in args else OP)(**args)
