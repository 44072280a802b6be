"""The op block_mass on CPU: exact, whatever the lse is; one graph; loud about wrong calls."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support.mass_cases import ANY_BLOCK, CASES, EACH_KEY, Case, build, case_of, check
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.kernels import mass_cpu
from dynamicrad_compile.kernels import mass_op as _registers_the_op  # noqa: F401

OP = torch.ops.dynamicrad.block_mass


@pytest.mark.parametrize("case", [*CASES, ANY_BLOCK, EACH_KEY], ids=str)
def test_matches_reference(case: Case):
    args = build(case)
    check(OP(*args), args)


@pytest.mark.parametrize("name", ["ragged", "gqa", "mask_random", "holes", "peaked", "block_not_power_of_two"])
def test_small_chunks_and_three_threads_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    args, before = build(case_of(name)), torch.get_num_threads()
    monkeypatch.setattr(mass_cpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(mass_cpu, "CHUNK_ROWS", 1)
    try:
        torch.set_num_threads(3)
        check(OP(*args), args)
    finally:
        torch.set_num_threads(before)


def test_a_row_sums_to_its_queries():
    mass = OP(*build(case_of("ragged")))
    torch.testing.assert_close(mass.sum(-1), torch.tensor([32.0] * 4 + [13.0]).expand(1, 2, 5))


def test_no_query_without_a_key_and_no_number_that_is_none():
    """A sample whose keys are all hidden has an lse of -inf and holds nothing; NaN in q, k, lse stay where they are."""
    assert not OP(*build(case_of("mask_all")))[0].any()
    for at in range(3):
        args = [x.clone() if isinstance(x, torch.Tensor) else x for x in build(case_of("even"))]
        args[at][0, 0, 40] = float("nan")
        assert not OP(*args).isnan().any()
        assert OP(*args)[0, 1].gt(0).all()


def test_hidden_keys_may_hold_anything():
    q, k, lse, *rest, mask = build(case_of("mask_random"))
    expected = OP(q, k, lse, *rest, mask)
    wild = torch.where(mask[:, None, :, None], k, float("nan"))
    torch.testing.assert_close(OP(q, wild, lse, *rest, mask), expected)


def test_the_lse_of_attention_fits():
    q, k, lse, *_ = build(case_of("ragged"))
    counts = torch.full((1, 1, 5), 11, dtype=torch.int32)
    own = torch.ops.dynamicrad.block_sparse_attention(q, k, k, counts, counts[..., None], None, 32, 32)[1]
    torch.testing.assert_close(OP(q, k, own, None, 32, 32), OP(q, k, lse, None, 32, 32), rtol=1e-5, atol=1e-6)


def test_no_keys_and_no_queries():
    for q_len, kv_len in ((0, 64), (64, 0)):
        q, k = torch.randn(1, 2, q_len, 8), torch.randn(1, 2, kv_len, 8)
        assert OP(q, k, torch.zeros(1, 2, q_len), None, 32, 32).shape == (1, 2, q_len // 32, kv_len // 32)


@pytest.mark.parametrize("name", ["ragged", "gqa", "permuted", "mask_random", "bf16"])
def test_opcheck(name: str):
    for op in (OP.default, torch.ops.dynamicrad.block_mass_cpu.default):
        torch.library.opcheck(op, build(case_of(name)))


def test_vmap():
    q, k, lse, *rest, _ = build(case_of("ragged"))
    queries = torch.stack((q, -q))
    got = torch.vmap(lambda x: OP(x, k, lse, *rest))(queries)
    for x, own in zip(queries, got, strict=True):
        torch.testing.assert_close(own, OP(x, k, lse, *rest))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str):
    q, k, lse, *rest = build(case_of("gqa"))
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda q, k, lse: 2 * OP(q + 1, k, lse, *rest), backend=counter, fullgraph=True)
    for step in range(2):
        torch.testing.assert_close(compiled(q, k, lse + step), 2 * OP(q + 1, k, lse + step, *rest))
    assert counter.frame_count == 1


def test_outputs_have_no_gradient():
    q, k, lse, *rest = build(case_of("ragged"))
    assert not OP(q.requires_grad_(), k, lse, *rest).requires_grad


@pytest.mark.parametrize("name", ["permuted", "gqa"])
def test_fake_output_is_that_of_the_op(name: str):
    args = build(case_of(name))
    with FakeTensorMode() as mode:
        fake = OP(*[mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args])
    real = OP(*args)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_flops_are_those_of_one_product():
    args = build(case_of("gqa"))
    with FlopCounterMode(display=False) as counter:
        OP(*args)
    assert counter.get_total_flops() == 2 * 2 * 4 * 99 * 333 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 64, 16)}, r"expected q \[B, H, Sq, D\]"),
        ({"k": torch.zeros(2, 4, 64, 8)}, "q and k must have the same head_dim"),
        ({"k": torch.zeros(2, 3, 64, 16)}, "Hkv must divide H"),
        ({"lse": torch.zeros(2, 4, 63)}, "lse must have q's batch, heads and length"),
        ({"lse": torch.zeros(2, 4, 64).double()}, r"expected lse float32 \[B, H, Sq\], as block_sparse_attention"),
        ({"lse": torch.zeros(2, 4, 64, 1)}, r"expected lse float32 \[B, H, Sq\]"),
        ({"lse": torch.zeros(2, 4, 64, device="meta")}, "lse is on meta, q on cpu"),
        ({"scale": -1.0}, "scale must be positive and finite"),
        ({"block_kv": 0}, "block_q and block_kv must be at least 1"),
        ({"kv_mask": torch.ones(2, 60, dtype=torch.bool)}, "kv_mask must cover every key"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(changes, message):
    args = {"q": torch.zeros(2, 4, 64, 16), "k": torch.zeros(2, 4, 64, 16), "lse": torch.zeros(2, 4, 64)}
    with pytest.raises(PlanError, match=message):
        OP(**(args | {"scale": None, "block_q": 32, "block_kv": 32} | changes))
