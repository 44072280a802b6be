"""What TensorRT needs of the attention, without TensorRT: the lowered op, models in standard operators, the kernel."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from support.graphs import call, relative_error
from support.plain import PLAIN
from zoo.exports import make

import dynamicrad_compile as drad
from dynamicrad_compile.exporting.tensorrt.build import main, parse_shapes
from dynamicrad_compile.exporting.tensorrt.graph import (
    ATTENTION,
    PLUGIN_ATTENTION,
    SECOND_ORDER,
    attention_for_plugin,
    block_means,
    kept_bits,
    kept_flags,
    lower,
    plugin_inputs,
    refusal,
    second_order_for_plugin,
)
from dynamicrad_compile.exporting.tensorrt.onnx import standard_attention, standard_second_order
from dynamicrad_compile.kernels.attention_arguments import Attention
from dynamicrad_compile.kernels.attention_reference import kept_blocks
from dynamicrad_compile.runtime.account import record

BATCH, HEADS, KV_HEADS, TOKENS, DIM, BLOCK = 2, 4, 2, 331, 40, 16
OPTIONS = {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "sparsity": 0.6}


def operands(plans=1, plan_heads=1, width=9):
    """Ragged blocks, a row without a block, one that is dense and ignores its indices."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, HEADS, TOKENS, DIM, generator=generator)
    k, v = torch.randn(2, BATCH, KV_HEADS, TOKENS, DIM, generator=generator)
    m = -(-TOKENS // BLOCK)
    counts = torch.randint(0, width + 1, (plans, plan_heads, m), dtype=torch.int32, generator=generator)
    counts[0, 0, 3], counts[0, 0, 5] = m, 0
    rows = [torch.randperm(m, generator=generator)[:width] for _ in range(plans * plan_heads * m)]
    mask = torch.rand(BATCH, TOKENS, generator=generator) > 0.3
    mask[:, : 2 * BLOCK] = False
    return q, k, v, counts, torch.stack(rows).view(plans, plan_heads, m, width).int(), mask


@pytest.mark.parametrize("m_k", [21, 32, 70])
def test_kept_blocks_as_flags_and_bits(m_k):
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 10, (2, 3, 5), dtype=torch.int32, generator=generator)
    counts[0, 0, 0], counts[1, 2, 4] = m_k, 0
    indices = torch.stack([torch.randperm(m_k, generator=generator)[:9] for _ in range(30)]).view(2, 3, 5, 9).int()
    expected = kept_blocks(counts, indices, m_k)
    assert (kept_flags(counts, indices, m_k) == expected).all()
    bits = kept_bits(counts, indices, m_k)
    assert bits.dtype == torch.int32
    for block in range(m_k):
        assert (((bits[..., block // 32] >> (block % 32)) & 1) == expected[..., block]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_means_are_those_of_the_op(dtype):
    _, k, _, _, _, mask = operands()
    k = k.to(dtype)
    for kv_mask in (None, mask):
        expected, count = torch.ops.dynamicrad.pool_blocks(k, BLOCK, kv_mask)
        torch.testing.assert_close(block_means(k, BLOCK, count, kv_mask), expected)


@pytest.mark.parametrize("attention", [attention_for_plugin, standard_attention])
@pytest.mark.parametrize(("plans", "plan_heads"), [(1, 1), (BATCH, HEADS)], ids=["shared", "own"])
@pytest.mark.parametrize("weights", [None, [0.5], [0.5, 0.0]], ids=["none", "one", "each"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_equals_the_op(attention, plans, plan_heads, weights, masked):
    q, k, v, counts, indices, mask = operands(plans, plan_heads)
    rest = (mask if masked else None, None if weights is None else torch.tensor(weights))
    expected, lse = ATTENTION(q, k, v, counts, indices, None, BLOCK, BLOCK, *rest)
    out, other = attention(q, k, v, counts, indices, None, BLOCK, BLOCK, *rest)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if other is not None:
        torch.testing.assert_close(other, lse)


@pytest.mark.parametrize("attention", [second_order_for_plugin, standard_second_order])
@pytest.mark.parametrize(("plans", "plan_heads"), [(1, 1), (BATCH, HEADS)], ids=["shared", "own"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_second_order_equals_the_op(attention, plans, plan_heads, masked):
    q, k, v, counts, indices, mask = operands(plans, plan_heads)
    rest = (mask if masked else None, torch.tensor([0.5, 1.0]))
    expected, lse = SECOND_ORDER(q, k, v, counts, indices, None, BLOCK, BLOCK, *rest)
    out, other = attention(q, k, v, counts, indices, None, BLOCK, BLOCK, *rest)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if other is not None:
        torch.testing.assert_close(other, lse)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    q, k, v, counts, indices, mask = operands()
    given = (q, k, v, counts, indices, 0.2, BLOCK, BLOCK, mask if masked else None, torch.ones(1))
    rest = plugin_inputs(Attention(*given))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(PLUGIN_ATTENTION, (*rest, 0.2, BLOCK, BLOCK), test_utils=tests)


def test_what_a_plugin_can_not_take():
    q, plan = torch.empty(1, 2, 64, 32, device="meta"), torch.empty(0)
    a = Attention(q, q, q, plan, plan, None, 64, 64)
    assert refusal(a) == ""
    assert "query blocks of 24 tokens" in refusal(a._replace(block_q=24))
    assert "float64" in refusal(a._replace(q=q.double()))
    assert "head_dim 320" in refusal(a._replace(q=torch.empty(1, 2, 64, 320, device="meta")))
    assert "int8" in refusal(a._replace(qk_int8=True))


def test_int8_products_stay_the_op():
    given = (*operands()[:5], None, BLOCK, BLOCK, None, None, True)
    out, lse = attention_for_plugin(*given)
    expected, expected_lse = ATTENTION(*given)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.slow
@pytest.mark.parametrize("covariance", [False, True])
def test_standard_model_in_onnxruntime(tmp_path, covariance):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, kwargs = make("wan", 1)
    options = {**OPTIONS, "compensate": 0.5, "covariance": covariance}
    found = drad.export(model.eval(), (), kwargs, tmp_path, "tensorrt", options, via="trtexec")
    assert found.card["commands"][0] == "trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped"
    session = onnxruntime.InferenceSession(found.path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {value.name: kwargs[value.name].numpy() for value in session.get_inputs()})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="dynamicrad", options={**options, "inner": "eager"})
    assert relative_error(torch.from_numpy(out), call(compiled, kwargs)) < 1e-5


@pytest.mark.slow
def test_plugin_model(tmp_path):
    onnx = pytest.importorskip("onnx")
    model, kwargs = make("wan", 1)
    options = {**OPTIONS, "compensate": 0.5}
    found = drad.export(model.eval(), (), kwargs, tmp_path, "tensorrt", options, dynamic_batch=True, via="plugin")
    nodes = [n for n in onnx.load(found.path, load_external_data=False).graph.node if n.domain == "dynamicrad"]
    assert [node.op_type for node in nodes] == ["BlockSparseAttentionMeans"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes.pop("scale") == [pytest.approx(24**-0.5)]
    assert attributes == {"block_q": [16], "block_kv": [16], "aot": 1,
                          "plugin_namespace": b"dynamicrad", "plugin_version": b"1"}  # fmt: skip
    assert len(nodes[0].input) == 10
    assert len(nodes[0].output) == 2
    command = found.card["commands"][0]
    assert "exporting.tensorrt.build model.onnx model.engine --min=hidden_states:1x4x5x12x18,timestep:1" in command
    assert parse_shapes(re.search(r"--max=(\S+)", command)[1])["hidden_states"] == (8, 4, 5, 12, 18)


@pytest.mark.slow
def test_plugin_model_with_covariances(tmp_path):
    """A plugin for the kept blocks, and one for the means of the others, which reads no block."""
    onnx = pytest.importorskip("onnx")
    model, kwargs = make("wan", 1)
    options = {**OPTIONS, "compensate": 0.5, "covariance": True}
    found = drad.export(model.eval(), (), kwargs, tmp_path, "tensorrt", options, dynamic_batch=True, via="plugin")
    nodes = [n for n in onnx.load(found.path, load_external_data=False).graph.node if n.domain == "dynamicrad"]
    assert [node.op_type for node in nodes] == ["BlockSparseAttention", "BlockSparseAttentionMeans"]


def test_mode_that_onnx_has_not(tmp_path):
    pytest.importorskip("onnx")
    model, kwargs = make("wan", 1)
    options = {**OPTIONS, "mode": "dynamic_threshold"}
    with pytest.raises(drad.ExportError, match=r"select_blocks.*Use mode='static_ratio'.*or via='torch'"):
        drad.export(model, (), kwargs, tmp_path / "out", "tensorrt", options, via="plugin")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"via": "onnx"}, "via must be one of torch, plugin, trtexec"),
        ({"via": "plugin", "opset": 9}, "opset must be 18"),
        ({"via": "plugin", "engine_options": {}}, "for via='torch'"),
    ],
)
def test_wrong_settings(settings, message, tmp_path):
    with pytest.raises(drad.ExportError, match=message):
        drad.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), {}, tmp_path, "tensorrt", **settings)


@pytest.mark.skipif(importlib.util.find_spec("torch_tensorrt") is not None, reason="Torch-TensorRT is here")
def test_without_torch_tensorrt(tmp_path, capsys):
    install = "torch_tensorrt, which is not installed. Install it: pip install 'torch-tensorrt>=2.13'"
    with pytest.raises(drad.ExportError, match=re.escape(install)):
        importlib.import_module("dynamicrad_compile.exporting.tensorrt.compile")
    with pytest.raises(drad.ExportError, match="not installed"):
        drad.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), {}, tmp_path, "tensorrt")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="not installed"):
        torch.compile(lambda x: x + 1, backend="dynamicrad", options={"inner": "tensorrt"})(torch.ones(2))
    assert main(["model.onnx", "model.engine"]) == 1
    assert "not installed" in capsys.readouterr().err
    assert not Path("model.engine").exists()


def test_shapes_of_the_command():
    assert parse_shapes("x:1x2x3,t:4") == {"x": (1, 2, 3), "t": (4,)}
    for text in ("x", "x:1xa", ":3"):
        with pytest.raises(drad.ExportError, match="name:1x2x3"):
            parse_shapes(text)


def test_the_accounts_of_the_report_are_left_out():
    root = torch.nn.Module()
    root.register_buffer("stats", torch.zeros(2, dtype=torch.float64))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(record, (graph.get_attr("stats"), x, None, x, 4, 16))
    graph.output(x)
    gm = torch.fx.GraphModule(root, graph)
    assert lower(gm) == 0
    assert not [node for node in gm.graph.nodes if node.target is record]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the check runs here")
def test_the_check_says_why_it_can_not_run(capsys):
    path = Path(__file__).parents[2] / "examples" / "tensorrt_check.py"
    spec = importlib.util.spec_from_file_location("tensorrt_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
