"""The op dynamicrad::block_sparse_attention on CPU: exact, contiguous, traceable, and loud about wrong arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.attention_cases import CASES, Case, build, check, check_result, reference
from support.marks import slow
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels import attention_cpu, groups_cpu, workers
from dynamicrad_compile.kernels import softmax_cpu as cpu_softmax
from dynamicrad_compile.kernels.attention_reference import token_mask
from dynamicrad_compile.plans.attention import block_sparse_attention
from dynamicrad_compile.plans.plan import BlockPlan

OP = torch.ops.dynamicrad.block_sparse_attention
BY_NAME = {case.name: case for case in CASES}


def random_plan(q_len: int, kv_len: int, block: int = 32, keep: float = 0.5) -> BlockPlan:
    mask = torch.rand(-(-q_len // block), -(-kv_len // block), generator=torch.Generator().manual_seed(0)) < keep
    mask[:, 0] = True
    return BlockPlan.from_mask(mask, block_q=block, block_kv=block, q_len=q_len, kv_len=kv_len)


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case):
    args = build(case)
    check_result(OP(*args), args, case)


@pytest.mark.parametrize(
    "name", ["ragged_both", "gqa_per_head", "per_batch_and_head", "mask_random", "bf16", "mask_all"]
)
def test_small_budgets_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    """Rows longer than a chunk, groups of one row, one head at a time."""
    monkeypatch.setattr(groups_cpu, "CHUNK_TOKENS", 33)
    monkeypatch.setattr(groups_cpu, "SCORE_BYTES", 1)
    monkeypatch.setattr(attention_cpu, "COPY_BYTES_PER_WORKER", 1)
    args = build(BY_NAME[name])
    check(*OP(*args), args, BY_NAME[name].dtype)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("length", [128, 131], ids=["even", "ragged"])
def test_keep_everything_equals_sdpa(length: int, kv_heads: int):
    q, _, _ = qkv(2, 4, length, 40)
    _, k, v = qkv(2, kv_heads, length, 40)
    plan = random_plan(length, length, keep=2.0)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan), expected, rtol=1e-5, atol=2e-6)


def test_gating_to_dense_only_changes_counts():
    q, k, v = qkv(1, 2, 203, 16)
    plan = random_plan(203, 203, keep=0.2)
    assert plan.kv_indices.shape[-1] < plan.num_kv_blocks
    dense = torch.where(torch.tensor(True), plan.num_kv_blocks, plan.kv_counts)
    out, _ = OP(q, k, v, dense, plan.kv_indices, None, 32, 32)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=2e-6)


def test_empty_plan_gives_zeros():
    q, k, v = qkv(1, 2, 67, 16)
    counts, indices = torch.zeros(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 1, dtype=torch.int32)
    out, lse = OP(q, k, v, counts, indices, None, 32, 32)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((1, 2, 67), float("-inf")))


def test_large_scores_do_not_overflow():
    q, k, v = qkv(1, 1, 101, 16)
    plan = random_plan(101, 101)
    out, lse = block_sparse_attention(100 * q, 100 * k, v, plan, return_lse=True)
    check(out, lse, (100 * q, 100 * k, v, plan.kv_counts, plan.kv_indices, None, 32, 32, None), torch.float32)


@pytest.mark.parametrize("v_scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("limit", [None, 0.0], ids=["plain", "shifted"])
def test_softmax_with_and_without_a_shift(limit: float | None, v_scale: float, monkeypatch: pytest.MonkeyPatch):
    """The same result, for values of any size; those too large or small for sums without a shift get one."""
    if limit is not None:
        monkeypatch.setattr(cpu_softmax, "LIMIT", limit)
    q, k, v = qkv(1, 2, 101, 16)
    plan = random_plan(101, 101)
    out, lse = block_sparse_attention(q, k, v_scale * v, plan, return_lse=True)
    args = (q, k, v, plan.kv_counts, plan.kv_indices, None, 32, 32, None)
    check(out / v_scale, lse, args, torch.float32)


def test_one_bad_query_block_spoils_no_other():
    q, k, v = qkv(1, 1, 128, 16)
    plan, bad = random_plan(128, 128), q.clone()
    bad[0, 0, 40] = float("nan")
    expected, out = (block_sparse_attention(x, k, v, plan) for x in (q, bad))
    assert out[0, 0, 40].isnan().all()
    others = torch.arange(128) != 40
    torch.testing.assert_close(out[:, :, others], expected[:, :, others], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kv_length", [[70, 115], torch.tensor([70, 115])], ids=["list", "tensor"])
def test_kv_length_is_a_key_mask(kv_length):
    q, k, v = qkv(2, 2, 115, 16)
    plan = random_plan(115, 115)
    mask = torch.arange(115) < torch.tensor([[70], [115]])
    got = block_sparse_attention(q, k, v, plan, kv_length=kv_length)
    assert torch.equal(got, block_sparse_attention(q, k, v, plan, kv_mask=mask))
    both = block_sparse_attention(q, k, v, plan, kv_length=kv_length, kv_mask=torch.arange(115)[None] < 50)
    assert torch.equal(both, block_sparse_attention(q, k, v, plan, kv_mask=(torch.arange(115) < 50)[None]))


def test_lse_merges_two_halves():
    """Attention over two disjoint key sets, merged by lse, is attention over their union."""
    q, k, v = qkv(1, 2, 128, 16)
    plan = random_plan(128, 128, keep=2.0)
    left = torch.arange(128)[None] < 57
    parts = [block_sparse_attention(q, k, v, plan, kv_mask=m, return_lse=True) for m in (left, ~left)]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0)[..., None]
    merged = sum(w * out for w, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=2e-6)


def test_autocast_does_not_narrow_the_products():
    q, k, v = qkv(1, 2, 101, 16)
    plan = random_plan(101, 101)
    expected = block_sparse_attention(q, k, v, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_sparse_attention(q, k, v, plan), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_number_changes_nothing(threads: int):
    args = build(BY_NAME["per_batch_and_head"])
    expected, before = OP(*args), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for got, want in zip(OP(*args), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_gradient_mode(mode):
    q, k, v = (x.requires_grad_() for x in qkv(2, 3, 101, 16))
    plan = random_plan(101, 101)
    with mode():
        out, lse = block_sparse_attention(q, k, v, plan, return_lse=True)
        check(out, lse, (q, k, v, plan.kv_counts, plan.kv_indices, None, 32, 32, None), torch.float32)


def test_a_failing_task_stops_the_others():
    done = []

    def fail(_):
        raise ValueError("this one")

    buffers = [workers.Buffers() for _ in range(workers.count())]
    with pytest.raises(ValueError, match="this one"):
        workers.run([fail] * workers.count() + [done.append] * 1000, buffers)
    workers.run([done.append] * 10, buffers)
    assert len(done) >= 10


# ---- tracing


@pytest.mark.parametrize(
    "name", ["ragged_both", "gqa_per_head", "per_batch_and_head", "permuted", "sliced", "mask_random", "bf16"]
)
def test_opcheck(name: str):
    args = build(BY_NAME[name])
    for op in (OP.default, torch.ops.dynamicrad.block_sparse_attention_cpu.default):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", ["permuted", "sliced"])
def test_fake_output_is_contiguous(name: str):
    args = build(BY_NAME[name])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        out, lse = OP(*fakes)
    real_out, real_lse = OP(*args)
    assert (out.shape, out.stride(), out.dtype) == (real_out.shape, real_out.stride(), real_out.dtype)
    assert (lse.shape, lse.stride(), lse.dtype) == (real_lse.shape, real_lse.stride(), real_lse.dtype)


class Block(torch.nn.Module):
    """A small attention layer whose q, k, v are strided views of one projection."""

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        self.plan = plan
        self.proj = torch.nn.Linear(48, 144)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in self.proj(x).chunk(3, -1))
        return x + block_sparse_attention(q, k, v, self.plan).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
def test_compiles_into_one_graph(backend: str):
    torch.manual_seed(0)
    model, x = Block(random_plan(101, 101)), torch.randn(2, 101, 48)
    with torch.inference_mode():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_compiles_with_a_dynamic_batch():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Block(random_plan(101, 101))
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for batch in (2, 3, 5):
            x = torch.randn(batch, 101, 48)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_exports_with_a_dynamic_batch():
    torch.manual_seed(0)
    model = Block(random_plan(101, 101)).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 101, 48),), dynamic_shapes={"x": {0: batch}})
        x = torch.randn(3, 101, 48)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
    assert "dynamicrad.block_sparse_attention" in str(program.graph)


# ---- FLOPs


@pytest.mark.parametrize("name", ["even", "ragged_both", "blocks_differ", "gqa_per_head", "per_batch_and_head"])
def test_flops_are_those_of_active_pairs(name: str):
    args = build(BY_NAME[name])
    batch, heads, q_len, dim = args[0].shape
    mask = token_mask(*args[3:5], *args[6:8], q_len, args[1].shape[2])
    with FlopCounterMode(display=False) as counter:
        OP(*args)
    assert counter.get_total_flops() == 4 * dim * int(mask.expand(batch, heads, -1, -1).sum())


def test_flops_of_fake_tensors_are_an_upper_bound():
    q, k, v = qkv(1, 2, 101, 16)
    plan = random_plan(101, 101, keep=0.3)
    with FlopCounterMode(display=False) as exact:
        block_sparse_attention(q, k, v, plan)
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as bound:
        fakes = [mode.from_tensor(x) for x in (q, k, v, plan.kv_counts, plan.kv_indices)]
        OP(*fakes, None, 32, 32)
    width = plan.kv_indices.shape[-1]
    assert bound.get_total_flops() == 4 * 16 * 2 * 101 * min(width * 32, 101)
    assert exact.get_total_flops() <= bound.get_total_flops()


# ---- errors


def call_with(**changes):
    q, k, v = qkv(2, 4, 64, 16)
    plan = random_plan(64, 64)
    args = {"q": q, "k": k, "v": v, "kv_counts": plan.kv_counts, "kv_indices": plan.kv_indices, "scale": None}
    return OP(**(args | {"block_q": 32, "block_kv": 32} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 64, 16)}, r"expected q \[B, H, Sq, D\]"),
        ({"v": torch.zeros(2, 4, 63, 16)}, "k and v must have the same length"),
        ({"q": torch.zeros(3, 4, 64, 16)}, "q and k must have the same batch"),
        ({"q": torch.zeros(2, 4, 64, 8)}, "q and k must have the same head_dim"),
        ({"q": torch.zeros(2, 5, 64, 16)}, "Hkv must divide H"),
        ({"q": torch.zeros(2, 4, 64, 16).double()}, "must share one dtype"),
        ({n: torch.zeros(2, 4, 64, 300) for n in "qkv"}, "head_dim must be 1 to 256, got 300"),
        ({"block_q": 0}, "block_q and block_kv must be at least 1, got 0 and 32"),
        ({"block_q": 16}, "64 queries in blocks of 16 make 4 rows"),
        ({"scale": -1.0}, "scale must be positive and finite"),
        ({"scale": float("nan")}, "scale must be positive and finite"),
        ({"kv_counts": torch.zeros(1, 1, 2)}, "must be int32"),
        ({"kv_counts": torch.zeros(1, 2, dtype=torch.int32)}, r"expected kv_counts \[B or 1, H or 1, Mq\]"),
        ({"kv_counts": torch.zeros(1, 4, 2, dtype=torch.int32)}, "disagree"),
        (
            {
                "kv_counts": torch.zeros(1, 3, 2, dtype=torch.int32),
                "kv_indices": torch.zeros(1, 3, 2, 1, dtype=torch.int32),
            },
            "the plan's head count must be 1 or that of q, 4",
        ),
        ({"kv_mask": torch.ones(2, 64)}, "expected kv_mask bool"),
        ({"kv_mask": torch.ones(3, 64, dtype=torch.bool)}, "kv_mask's batch must be 1 or that of q"),
        ({"kv_mask": torch.ones(2, 60, dtype=torch.bool)}, "kv_mask must cover every key"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(changes, message):
    with pytest.raises(PlanError, match=message):
        call_with(**changes)


def test_wrapper_names_both_lengths():
    q, k, v = qkv(1, 2, 64, 16)
    with pytest.raises(PlanError, match="the plan is for 96 queries, not for 64"):
        block_sparse_attention(q, k, v, random_plan(96, 64))
    with pytest.raises(PlanError, match="the plan is for 96 keys, not for 64"):
        block_sparse_attention(q, k, v, random_plan(64, 96))
    with pytest.raises(PlanError, match=r"expected kv_length int \[B\]"):
        block_sparse_attention(q, k, v, random_plan(64, 64), kv_length=torch.tensor([1.5]))


def test_reference_agrees_with_sdpa_under_its_own_mask():
    args = build(BY_NAME["mask_random"])
    q, k, v = args[:3]
    mask = token_mask(*args[3:5], *args[6:8], q.shape[2], k.shape[2]) & args[8][:, None, None, :]
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    torch.testing.assert_close(reference(args)[0], expected)
