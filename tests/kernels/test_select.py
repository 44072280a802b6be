"""The ops select_blocks and select_blocks_ on CPU: the right blocks, one graph, state kept, loud about wrong calls."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from support.select_cases import CASES, CRITERIA, RANKS, SHORT_LIST, Case, build, check
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dynamicrad_compile.errors import OptionsError, PlanError
from dynamicrad_compile.kernels import select_cpu as cpu_select
from dynamicrad_compile.kernels.select_arguments import Selection, State
from dynamicrad_compile.kernels.select_arguments import with_state as in_order
from dynamicrad_compile.kernels.select_op import cost
from dynamicrad_compile.kernels.select_reference import NO_ERROR, candidate_rows, select_blocks_reference
from dynamicrad_compile.plans.plan import BlockPlan, Candidates
from dynamicrad_compile.plans.selection import select_blocks

OP = torch.ops.dynamicrad.select_blocks
OP_STATE = torch.ops.dynamicrad.select_blocks_
BY_NAME = {case.name: case for case in CASES}
KEEP_ALL = {"threshold": -math.inf, "mass": 1.0, "ratio": 1.0}
KEEP_NONE = {"threshold": math.inf, "mass": 0.0, "ratio": 0.0}


def with_thresholds(args: tuple, *pairs: tuple[float, float]) -> tuple:
    return (*args[:6], torch.tensor(pairs), *args[7:])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, criterion: str):
    args = build(case, criterion)
    close = check(*OP(*args), args)
    if case.dtype == torch.float32:
        assert close <= 0.02


@pytest.mark.parametrize(("case", "criterion"), SHORT_LIST, ids=str)
def test_by_error_matches_reference(case: Case, criterion: str):
    args = build(case, criterion, "error")
    close = check(*OP(*args), args)
    if case.dtype == torch.float32:
        assert close <= 0.02


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["gqa_per_head", "per_batch_and_head", "mask_random", "thresholds_per_sample"])
def test_small_chunks_give_the_same(name: str, criterion: str, rank: str, monkeypatch: pytest.MonkeyPatch):
    args = build(BY_NAME[name], criterion, rank)
    expected = OP(*args)
    monkeypatch.setattr(cpu_select, "CHUNK_BYTES", 1)
    for got, want in zip(OP(*args), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["ragged", "gqa_per_head", "mask_all", "peaked", "overflowing", "equal_keys"])
def test_everything_and_nothing(name: str, criterion: str, rank: str):
    """The extreme thresholds keep all candidates, or the forced ones, or the single best."""
    args = build(BY_NAME[name], criterion, rank)
    q, _, counts, indices, forced = args[:5]
    shape = (*q.shape[:2], -1)
    full, full_indices = OP(*with_thresholds(args, (KEEP_ALL[criterion],) * 2))
    assert torch.equal(full, counts.expand(shape))
    listed = torch.arange(indices.shape[-1]) < torch.where(counts >= 1000, 0, counts)[..., None]
    dense = (counts == -(-args[1].shape[2] // args[9]))[..., None]
    assert torch.equal(full_indices, torch.where(listed & ~dense, indices, 0).expand_as(full_indices))
    few, _ = OP(*with_thresholds(args, (KEEP_NONE[criterion],) * 2))
    expected = torch.where(dense[..., 0], counts, torch.where(counts > 0, forced.clamp(min=1), 0))
    assert torch.equal(few, expected.expand(shape))


@pytest.mark.parametrize("criterion", ["mass", "ratio"])
def test_of_equal_candidates_the_earlier_is_kept(criterion: str):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-1, 2, (1, 2, 8, 16), generator=generator).float().repeat_interleave(16, 2)
    k = torch.randint(0, 2, (1, 2, 40, 1), generator=generator).float().expand(-1, -1, -1, 16).repeat_interleave(16, 2)
    ids = torch.rand(1, 1, 8, 40, generator=generator).argsort(-1)[..., :30].int()
    counts, forced, near = (torch.full((1, 1, 8), n, dtype=torch.int32) for n in (30, 2, 13))
    args = (q, k, ids.new_empty(0), torch.tensor([[0.43, 0.61]]), None, 16, 16, criterion)
    args = (q, k, counts, ids, forced, near, *args[3:])
    for got, want in zip(OP(*args), select_blocks_reference(*args), strict=True):
        assert torch.equal(got, want)


def test_mass_is_that_of_the_group():
    """A group far below the row's best score is judged by its own masses, which underflow beside the other's."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([300.0, 299.0, 0.0, -1.0, -2.0, -300.0]).view(1, 1, 6, 1)
    ids = torch.arange(5, dtype=torch.int32).view(1, 1, 1, 5)
    counts, forced, near = (torch.full((1, 1, 1), n, dtype=torch.int32) for n in (5, 0, 2))
    # exp(0, -1, -2) = 1, 0.37, 0.14: the first holds 0.665 of them, the first two 0.91.
    for target, kept in ((0.6, 1), (0.7, 2), (0.9, 2), (0.95, 3)):
        got, indices = OP(q, k, counts, ids, forced, near, torch.tensor([[0.5, target]]), 1.0, 1, 1, "mass")
        assert indices.flatten().tolist() == [0, *range(2, 2 + kept), *[0] * (4 - kept)]
        assert got.item() == 1 + kept


def test_threshold_means_the_same_for_every_head_dim_and_number_of_candidates():
    """log(N * p) does not change when candidates and head_dim are doubled."""
    args = list(build(BY_NAME["ragged"], "threshold"))
    got, _ = OP(*args)
    wide = [torch.cat((x, x), -1) / 2**0.25 for x in args[:2]]  # scores scale with 1 / sqrt(D)
    torch.testing.assert_close(OP(*wide, *args[2:])[0], got)
    q, k = torch.randn(1, 1, 96, 16), torch.randn(1, 1, 160, 16)
    ids = torch.rand(1, 1, 3, 10).argsort(-1)[..., :9].int()
    zero, n = torch.zeros(1, 1, 3, dtype=torch.int32), torch.full((1, 1, 3), 9, dtype=torch.int32)
    settings = (zero, zero, torch.tensor([[0.0, 0.0]]), 3.0, 32, 16, "threshold")
    once, _ = OP(q, k, n, ids, *settings)
    twice, _ = OP(q, torch.cat((k, k), 2), 2 * n, torch.cat((ids, ids + 10), -1), *settings)
    assert 0 < int(once.sum()) < 27
    assert torch.equal(twice, 2 * once)


def single_row(scale: float, keys: list[list[float]], rank: str, mask: torch.Tensor | None = None) -> list[int]:
    """Ids of the blocks in the order in which "ratio" takes them, for a query block with the tokens 3 and 1."""
    q = torch.tensor([3.0, 1.0]).view(1, 1, 2, 1)
    k = torch.tensor(keys).view(1, 1, -1, 1)
    n, size = len(keys), len(keys[0])
    # One id more in the table, because a row of all blocks is dense.
    ids = torch.arange(n, dtype=torch.int32).view(1, 1, 1, n)
    k = torch.cat((k, k[:, :, -size:]), 2)
    mask = None if mask is None else torch.cat((mask, mask[:, -size:]), 1)
    counts, zero = torch.full((1, 1, 1), n, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
    order: list[int] = []
    for number in range(1, n + 1):
        thresholds = torch.tensor([[0.0, (number - 0.5) / n]])
        args = (q, k, counts, ids, zero, zero, thresholds, scale, 2, size, "ratio", mask, rank)
        got, indices = OP(*args)
        for x, y in zip((got, indices), select_blocks_reference(*args), strict=True):
            assert torch.equal(x, y)
        order += sorted(set(indices.flatten()[: int(got)].tolist()) - set(order))
    return order


def test_error_is_mass_times_variance():
    """e = scale^2 / 2 * mean(3^2, 1^2) * var = 0.025 var with scale 0.1; the mean query is 2."""
    keys = [[0.0, 2.0], [0.5, 1.5], [9.0, 9.2], [8.0, 12.0]]
    assert single_row(0.1, keys, "mass") == [3, 2, 0, 1]
    # log of mass and error: 0.2 + log(0.025), 0.2 + log(0.00625), 1.82 + log(0.00025), 2 + log(0.1), and log(2)
    assert single_row(0.1, keys, "error") == [3, 0, 1, 2]
    s = Selection(*build(BY_NAME["dim_1"], "ratio", "error"))
    row = next(r for r in candidate_rows(s) if not r.dense and r.ids)
    b, h, i = row.where
    q = s.q[b, h, i * s.block_q : (i + 1) * s.block_q].double()
    k = s.k[b, h, row.ids[0] * s.block_kv : (row.ids[0] + 1) * s.block_kv].double()
    # For one channel this is the expectation over queries and keys of the softmax's second-order term.
    error = (0.5 * (s.factor * q @ (k - k.mean(0)).T) ** 2).mean()
    expected = s.factor * q.mean() * k.mean() + math.log(len(k)) + error.log()
    assert row.scores[0] == pytest.approx(float(expected), rel=1e-9)


def test_blocks_without_variance_come_last_and_hidden_ones_after_them():
    """However much mass they hold; among themselves the earlier comes first."""
    keys = [[50.0, 50.0], [0.0, 0.0], [-60.0, -60.1], [90.0, 90.0], [0.0, 1.0]]
    assert single_row(1.0, keys, "error") == [4, 2, 0, 1, 3]
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[0, :2] = mask[0, 4] = False  # block 0 has no valid key, block 2 has one: no variance
    assert single_row(1.0, keys, "error", mask) == [4, 1, 2, 3, 0]
    s = Selection(*build(BY_NAME["all_equal_keys"], "mass", "error"))
    assert {x for row in candidate_rows(s) for x in row.scores} == {NO_ERROR}


@pytest.mark.parametrize("criterion", ["threshold", "mass"])
def test_shares_of_the_error_do_not_see_blocks_without_variance(criterion: str):
    args = list(build(BY_NAME["equal_keys"], criterion, "error"))
    args[6] = torch.tensor([[-20.0, -20.0]]) if criterion == "threshold" else torch.tensor([[0.9999, 0.9999]])
    counts, indices = OP(*args)
    seen = 0
    for row in candidate_rows(Selection(*args)):
        if row.dense or all(x <= NO_ERROR for x in row.scores):
            continue
        exact = {j for j, x in list(zip(row.ids, row.scores, strict=True))[row.forced :] if x <= NO_ERROR}
        groups = [[row.scores[j] for j in group] for group in row.groups]
        if criterion == "mass" and any(group and max(group) <= NO_ERROR for group in groups):
            continue  # a group of such blocks divides its share among them
        seen += len(exact)
        assert not exact & set(indices[row.where][: int(counts[row.where])].tolist())
    assert seen > 10


@pytest.mark.parametrize("rank", RANKS)
def test_not_a_number_keeps_counts_valid(rank: str):
    args = list(build(BY_NAME["ragged"], "threshold"))
    args[0] = torch.full_like(args[0], float("nan"))
    for criterion in CRITERIA:
        counts, _ = OP(*args[:10], criterion, None, rank)
        assert torch.equal(counts > 0, (args[2] > 0).expand_as(counts))


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_number_changes_nothing(threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_select, "CHUNK_BYTES", 2000)
    args, before = build(BY_NAME["per_batch_and_head"], "mass"), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(*OP(*args), args)
    finally:
        torch.set_num_threads(before)


def candidates(case: Case, plan: list[torch.Tensor]) -> Candidates:
    counts, indices, forced, near = plan
    blocks = BlockPlan(counts, indices, case.block_q, case.block_kv, case.q_len, case.kv_len, compensate=(0.5,))
    return Candidates(blocks, forced, near)


@pytest.mark.parametrize("rank", RANKS)
def test_wrapper_returns_a_plan(rank: str):
    case = BY_NAME["per_batch_and_head"]
    args = build(case, "mass", rank)
    q, k, *plan, _, scale, _, _, criterion, mask = args[:12]
    chosen = select_blocks(q, k, candidates(case, plan), (0.8, 0.55), criterion, scale, kv_mask=mask, rank=rank)
    counts, indices = OP(*args)
    assert torch.equal(chosen.kv_counts, counts)
    assert torch.equal(chosen.kv_indices, indices)
    assert chosen.compensate == (0.5,)
    with pytest.raises(PlanError, match="the candidates are for 160 queries, not for 150"):
        select_blocks(q[:, :, :150], k, candidates(case, plan), (0.8, 0.55))


# ---- state


def with_state(args: tuple, refresh: bool) -> tuple:
    q, indices = args[0], args[3]
    shape = (*q.shape[:2], *indices.shape[2:])
    state = torch.full(shape[:3], 5, dtype=torch.int32), torch.full(shape, 6, dtype=torch.int32)
    return in_order(args, (*state, torch.tensor([refresh])))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_refresh_writes_the_state(criterion: str, rank: str):
    args = build(BY_NAME["gqa_per_head"], criterion, rank)
    full = with_state(args, True)
    assert OP_STATE(*full) is None
    for got, want in zip(full[11:13], OP(*args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rank", RANKS)
def test_without_refresh_nothing_is_computed(rank: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_select, "select", None)
    full = with_state(build(BY_NAME["gqa_per_head"], "mass", rank), False)
    OP_STATE(*full)
    assert bool((full[11] == 5).all())
    assert bool((full[12] == 6).all())


class Reuse(torch.nn.Module):
    """Chooses blocks where `refresh` says so and attends over the last choice."""

    def __init__(self, args: tuple) -> None:
        super().__init__()
        names = ("counts", "indices", "forced", "near", "thresholds")
        for name, tensor in zip(names, args[2:7], strict=True):
            self.register_buffer(name, tensor.clone())
        state = with_state(args, True)[11:14]
        for name, tensor in zip(("state_counts", "state_indices", "refresh"), state, strict=True):
            self.register_buffer(name, tensor)
        self.settings = args[7:11]

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        plan = (self.counts, self.indices, self.forced, self.near, self.thresholds)
        OP_STATE(q * 2, k, *plan, *self.settings, self.state_counts, self.state_indices, self.refresh)
        scale, block_q, block_kv, _ = self.settings
        state = (self.state_counts, self.state_indices)
        return torch.ops.dynamicrad.block_sparse_attention(q * 2, k, k, *state, scale, block_q, block_kv)[0]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_state_in_a_compiled_module(backend: str, grad: bool):
    """One graph; the state is written when refresh says so, and kept else."""
    args = build(BY_NAME["gqa"], "mass")
    q, k = args[:2]
    model, other = Reuse(args), -q
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for step, (queries, refresh) in enumerate(((q, True), (other, False), (other, True), (q, False))):
            model.refresh.fill_(refresh)
            before = model.state_counts.clone(), model.state_indices.clone()
            queries = queries.clone().requires_grad_(grad)
            out = compiled(queries, k)
            state = model.state_counts, model.state_indices
            expected = OP(queries * 2, k, *args[2:11]) if refresh else before
            for got, want in zip(state, expected, strict=True):
                assert torch.equal(got, want), f"step {step}"
            want, _ = torch.ops.dynamicrad.block_sparse_attention(queries * 2, k, k, *state, *args[7:10])
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
            assert out.requires_grad == grad
            assert not any(x.requires_grad for x in state)
    assert counter.frame_count == 1


# ---- tracing


@pytest.mark.parametrize(
    ("name", "criterion", "rank"),
    [
        ("ragged", "threshold", "mass"),
        ("gqa_per_head", "mass", "error"),
        ("permuted", "ratio", "mass"),
        ("mask_random", "mass", "error"),
    ],
)
def test_opcheck(name: str, criterion: str, rank: str):
    args = build(BY_NAME[name], criterion, rank)
    for op in (OP.default, torch.ops.dynamicrad.select_blocks_cpu.default):
        torch.library.opcheck(op, args)
    for op in (OP_STATE.default, torch.ops.dynamicrad.select_blocks_cpu_.default):
        torch.library.opcheck(op, with_state(args, True))


class Select(torch.nn.Module):
    def __init__(self, args: tuple) -> None:
        super().__init__()
        self.args = args

    def forward(self, q: torch.Tensor, k: torch.Tensor, thresholds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return OP(q, k, *self.args[2:6], thresholds, *self.args[7:])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str):
    args = build(BY_NAME["gqa"], "ratio", "error")
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(Select(args), backend=counter, fullgraph=True)
    for pair in ((0.7, 0.3), (1.0, 1.0), (0.0, 0.0)):
        thresholds = torch.tensor([pair])
        got, want = compiled(*args[:2], thresholds), OP(*with_thresholds(args, pair))
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert counter.frame_count == 1


def test_exports_with_a_dynamic_batch():
    args = build(BY_NAME["gqa"], "mass")
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"q": {0: batch}, "k": {0: batch}, "thresholds": None}
    program = torch.export.export(Select(args), (*args[:2], args[6]), dynamic_shapes=shapes)
    q, k = (torch.cat((x, x[:1])) for x in args[:2])
    got, want = program.module()(q, k, args[6]), OP(q, k, *args[2:])
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert "dynamicrad.select_blocks" in str(program.graph)


@pytest.mark.parametrize("name", ["permuted", "gqa_per_head"])
def test_fake_output_is_that_of_the_op(name: str):
    args = build(BY_NAME[name], "mass")
    with FakeTensorMode() as mode:
        fakes = OP(*[mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args])
    for fake, real in zip(fakes, OP(*args), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


# ---- cost


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dim", [64, 128])
def test_costs_less_than_two_percent_of_dense_attention(dim: int, criterion: str, rank: str):
    """32,768 tokens, every block a candidate; H200: 600 TFLOP/s in dense attention, 4.8 TB/s."""
    spent = cost(1, 40, 40, 32768, 32768, dim, 128, 128, 256, criterion, rank=rank)
    dense = 4 * 32768**2 * dim * 40
    assert spent.flops < 0.0002 * dense
    assert spent.bytes / 4.8e12 < 0.005 * dense / 600e12


@pytest.mark.parametrize("rank", RANKS)
def test_flops_are_those_of_cost(rank: str):
    args = build(BY_NAME["gqa"], "mass", rank)
    q, k, indices = args[0], args[1], args[3]
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], 32, 32, indices.shape[3])
    expected = cost(*sizes, "mass", rank=rank).flops
    named = dict(zip(in_order(Selection._fields, State._fields), with_state(args, True), strict=False))
    q, k = named.pop("q"), named.pop("k")
    for call in (lambda: OP(*args), lambda: OP_STATE(*with_state(args, True)), lambda: OP_STATE(q, k, **named)):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == expected


# ---- errors


def call_with(**changes):
    table = torch.zeros(1, 1, 2, dtype=torch.int32)
    args = {"q": torch.zeros(2, 4, 64, 16), "k": torch.zeros(2, 4, 64, 16), "kv_counts": table, "kv_forced": table}
    args |= {"kv_near": table, "kv_indices": torch.zeros(1, 1, 2, 1, dtype=torch.int32), "scale": None}
    args |= {"thresholds": torch.zeros(1, 2), "block_q": 32, "block_kv": 32, "criterion": "threshold"} | changes
    return (OP_STATE if "refresh" in args else OP)(**args)


STATE = {
    "state_counts": torch.zeros(2, 4, 2, dtype=torch.int32),
    "state_indices": torch.zeros(2, 4, 2, 1, dtype=torch.int32),
    "refresh": torch.tensor([True]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 64, 16)}, r"expected q \[B, H, Sq, D\]"),
        ({"q": torch.zeros(3, 4, 64, 16)}, "q and k must have the same batch"),
        ({"q": torch.zeros(2, 4, 64, 8)}, "q and k must have the same head_dim"),
        ({"q": torch.zeros(2, 5, 64, 16)}, "Hkv must divide H"),
        ({"q": torch.zeros(2, 4, 64, 16).double()}, "must share one dtype"),
        ({n: torch.zeros(2, 4, 64, 300) for n in "qk"}, "head_dim must be 1 to 256, got 300"),
        ({"block_kv": 0}, "block_q and block_kv must be at least 1, got 32 and 0"),
        ({"block_q": 16}, "64 queries in blocks of 16 make 4 rows"),
        ({"scale": -1.0}, "scale must be positive and finite"),
        ({"scale": math.nan}, "scale must be positive and finite"),
        ({"kv_counts": torch.zeros(1, 1, 2)}, "must be int32"),
        ({"kv_indices": torch.zeros(1, 1, 2, 0, dtype=torch.int32)}, "at least one entry wide"),
        ({"kv_forced": torch.zeros(1, 1, 2)}, "expected kv_forced int32"),
        ({"kv_near": torch.zeros(1, 4, 2, dtype=torch.int32)}, "kv_near must have the shape of kv_counts"),
        ({"thresholds": torch.zeros(2)}, r"expected thresholds float32 \[B or 1, 2\]"),
        ({"thresholds": torch.zeros(1, 2).double()}, r"expected thresholds float32 \[B or 1, 2\]"),
        ({"thresholds": torch.zeros(1, 3)}, r"expected thresholds float32 \[B or 1, 2\]"),
        ({"thresholds": torch.zeros(3, 2)}, "the batch of thresholds must be 1 or that of q"),
        ({"kv_mask": torch.ones(2, 64)}, "expected kv_mask bool"),
        ({"kv_mask": torch.ones(3, 64, dtype=torch.bool)}, "kv_mask's batch must be 1 or that of q"),
        ({"kv_mask": torch.ones(2, 60, dtype=torch.bool)}, "kv_mask must cover every key"),
        (STATE | {"state_counts": torch.zeros(2, 4, 2)}, r"expected state_counts int32 \[2, 4, 2\]"),
        (STATE | {"state_counts": torch.zeros(2, 4, 3, dtype=torch.int32)}, r"expected state_counts int32 \[2, 4, 2\]"),
        (STATE | {"state_indices": torch.zeros(2, 4, 2, 2, dtype=torch.int32)}, r"state_indices int32 \[2, 4, 2, 1\]"),
        (
            STATE | {"state_indices": torch.zeros(2, 2, 4, 1, dtype=torch.int32).mT.contiguous().mT},
            "expected state_counts",
        ),
        (STATE | {"refresh": torch.tensor(True)}, r"expected refresh bool \[1\]"),
        (STATE | {"refresh": torch.tensor([1])}, r"expected refresh bool \[1\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(changes, message):
    with pytest.raises(PlanError, match=message):
        call_with(**changes)


def test_unknown_criterion():
    with pytest.raises(OptionsError, match=r"criterion must be one of .* Did you mean 'ratio'"):
        call_with(criterion="ratios")


def test_unknown_rank():
    with pytest.raises(OptionsError, match=r"rank must be one of mass, error, got 'eror'\. Did you mean 'error'"):
        call_with(rank="eror")
