"""Function bodies of the ONNX nodes, in onnxruntime, against the slow references of the ops."""

from __future__ import annotations

import pytest
import torch
from support.select_cases import CASES, CRITERIA, RANKS, build, check

from dynamicrad_compile.kernels.attention_arguments import Attention
from dynamicrad_compile.kernels.attention_reference import block_sparse_attention_reference
from dynamicrad_compile.kernels.moments import growth_and_shift, moments_of
from dynamicrad_compile.kernels.moments_reference import second_order_attention_reference
from dynamicrad_compile.plans.plan import BlockPlan

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper  # noqa: E402

from dynamicrad_compile.exporting.onnx.functions import attach_functions  # noqa: E402

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


def run_node(name, inputs, outputs, opset=18, **attributes):
    """Outputs of one node of the domain `dynamicrad` with its function body."""
    given = [helper.make_tensor_value_info(key, TYPES[x.dtype], x.shape) for key, x in inputs.items()]
    made = [helper.make_tensor_value_info(key, TYPES[dtype], shape) for key, (dtype, shape) in outputs.items()]
    node = helper.make_node(name, list(inputs), list(outputs), domain="dynamicrad", **attributes)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("dynamicrad", 1)]
    model = helper.make_model(helper.make_graph([node], "node", given, made), opset_imports=opsets, ir_version=10)
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {key: x.contiguous().numpy() for key, x in inputs.items()})]


def attention(q, k, v, plan, mask, compensate, opset=18):
    kv_mask = torch.ones(1, k.shape[2], dtype=torch.bool) if mask is None else mask
    inputs = {"q": q, "k": k, "v": v, "kv_counts": plan.kv_counts, "kv_indices": plan.kv_indices}
    inputs |= {"kv_mask": kv_mask, "compensate": compensate}
    attributes = {"scale": 0.3, "block_q": plan.block_q, "block_kv": plan.block_kv}
    (out,) = run_node("BlockSparseAttention", inputs, {"out": (q.dtype, q.shape)}, opset, **attributes)
    tables = (plan.kv_counts, plan.kv_indices, 0.3, plan.block_q, plan.block_kv)
    expected, _ = block_sparse_attention_reference(q, k, v, *tables, kv_mask.expand(len(q), -1), compensate)
    return out, expected


def random_plan(batch, heads, q_len, kv_len, block_q, block_kv, seed=0):
    """About 40 % of the blocks, an empty row and a dense one."""
    generator = torch.Generator().manual_seed(seed)
    m_q, m_k = -(-q_len // block_q), -(-kv_len // block_kv)
    mask = torch.rand(batch, heads, m_q, m_k, generator=generator) < 0.4
    mask[0, 0, 0], mask[-1, -1, -1] = False, True
    return BlockPlan.from_mask(mask, block_q=block_q, block_kv=block_kv, q_len=q_len, kv_len=kv_len)


SHAPES = {  # batch, heads, kv_heads, q_len, kv_len, head_dim, block_q, block_kv, plan batch, plan heads
    "ragged": (2, 4, 4, 77, 77, 12, 16, 16, 1, 1),
    "gqa, plan per head": (2, 4, 2, 77, 77, 12, 16, 16, 2, 4),
    "blocks differ": (1, 2, 1, 50, 91, 24, 32, 16, 1, 2),
    "one block": (3, 1, 1, 7, 5, 8, 16, 16, 1, 1),
}


@pytest.mark.parametrize("compensate", [[0.0], [1.0], "by sample"], ids=["dropped", "compensated", "by sample"])
@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention(shape, mask, compensate):
    batch, heads, kv_heads, q_len, kv_len, dim, block_q, block_kv, plan_batch, plan_heads = shape
    plan = random_plan(plan_batch, plan_heads, q_len, kv_len, block_q, block_kv)
    q = torch.randn(batch, heads, q_len, dim)
    k, v = torch.randn(2, batch, kv_heads, kv_len, dim)
    keep = None
    if mask == "random":
        keep = torch.rand(batch, kv_len) < 0.7
        keep[0, :block_kv] = False  # a block without a valid key
    weights = torch.linspace(0, 1, batch) if compensate == "by sample" else torch.tensor(compensate)
    out, expected = attention(q, k, v, plan, keep, weights)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_second_order(shape, mask):
    """The node with the moments that are computed before it, against the reference of the op."""
    batch, heads, kv_heads, q_len, kv_len, dim, block_q, block_kv, plan_batch, plan_heads = shape
    plan = random_plan(plan_batch, plan_heads, q_len, kv_len, block_q, block_kv)
    q = torch.randn(batch, heads, q_len, dim)
    k, v = torch.randn(2, batch, kv_heads, kv_len, dim)
    keep = torch.ones(batch, kv_len, dtype=torch.bool)
    if mask == "random":
        keep = torch.rand(batch, kv_len) < 0.7
        keep[0, :block_kv] = False
    tables, sizes = (plan.kv_counts, plan.kv_indices), (plan.block_q, plan.block_kv)
    weights = torch.linspace(0, 1, batch) if batch > 1 else torch.ones(1)
    given = Attention(q, k, v, *tables, 0.3, *sizes, keep, weights)
    growth, shift = growth_and_shift(given, moments_of(given))
    inputs = {"q": q, "k": k, "v": v, "kv_counts": tables[0], "kv_indices": tables[1], "kv_mask": keep}
    inputs |= {"compensate": weights, "growth": growth, "shift": shift}
    attributes = {"scale": 0.3, "block_q": plan.block_q, "block_kv": plan.block_kv}
    (out,) = run_node("SecondOrderAttention", inputs, {"out": (q.dtype, q.shape)}, **attributes)
    torch.testing.assert_close(out.double(), second_order_attention_reference(*given)[0], rtol=2e-5, atol=5e-6)


def test_dense_rows_do_not_read_indices():
    plan = random_plan(1, 2, 77, 77, 16, 16)
    counts, indices = torch.full_like(plan.kv_counts, 5), torch.zeros_like(plan.kv_indices[..., :1])
    q, k, v = torch.randn(3, 1, 2, 77, 8)
    gated = BlockPlan(counts, indices, 16, 16, 77, 77)
    out, _ = attention(q, k, v, gated, None, torch.ones(1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=2e-6)


def test_nothing_to_read_gives_zeros():
    plan = BlockPlan(
        torch.zeros(1, 1, 5, dtype=torch.int32), torch.zeros(1, 1, 5, 1, dtype=torch.int32), 16, 16, 77, 77
    )
    q, k, v = torch.randn(3, 1, 2, 77, 8)
    out, _ = attention(q, k, v, plan, None, torch.zeros(1))
    assert not out.any()


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_opsets(opset):
    plan = random_plan(1, 1, 40, 40, 16, 16)
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    out, expected = attention(q, k, v, plan, None, torch.ones(1), opset)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


def test_half_precision():
    plan = random_plan(1, 1, 77, 77, 16, 16)
    q, k, v = torch.randn(3, 1, 2, 77, 8).half()
    out, expected = attention(q, k, v, plan, None, torch.ones(1))
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)  # rounding of the output


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_selection(criterion, rank):
    """The cases of the op itself: what is kept, in which order."""
    for case in CASES:
        if case.dtype != torch.float32:
            continue
        args = build(case, criterion, rank)
        q, k, counts, indices, forced, near, thresholds, scale, block_q, block_kv, _, mask = args[:12]
        inputs = {"q": q, "k": k, "kv_counts": counts, "kv_indices": indices, "kv_forced": forced, "kv_near": near}
        inputs["thresholds"] = thresholds
        inputs["kv_mask"] = torch.ones(1, k.shape[2], dtype=torch.bool) if mask is None else mask
        attributes = {"scale": scale or q.shape[-1] ** -0.5, "block_q": block_q, "block_kv": block_kv}
        name, attributes["by_error"] = "SelectBlocksByThreshold", int(rank == "error")
        if criterion != "threshold":
            name, attributes["by_mass"] = "SelectBlocksByOrder", int(criterion == "mass")
        shape = (*q.shape[:2], *indices.shape[2:])
        outputs = {"counts": (torch.int32, shape[:3]), "indices": (torch.int32, shape)}
        found = run_node(name, inputs, outputs, **attributes)
        assert check(*found, args) < 0.01, case.name  # rows that differ within rounding
