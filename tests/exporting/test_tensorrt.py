"""TensorRT without a GPU: the op reaches TensorRT's network, its plugins evaluate, engines of whole models are built.

Nothing here is launched. Install what it runs on with `make test-tensorrt`; `tensorrt_standin` says what is real.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support import tensorrt_standin as standin
from support.graphs import call, dynamic_batch, make, relative_error
from support.plain import PLAIN

pytestmark = pytest.mark.tensorrt
torch_tensorrt = standin.install()

import tensorrt as trt  # noqa: E402
import tensorrt.plugin as trtp  # noqa: E402
from torch_tensorrt.dynamo import CompilationSettings, partitioning  # noqa: E402
from torch_tensorrt.dynamo.backend import backends  # noqa: E402
from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS, TRTInterpreter  # noqa: E402
from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering  # noqa: E402

import dynamicrad_compile as drad  # noqa: E402
from dynamicrad_compile.exporting.tensorrt import build as tensorrt_build  # noqa: E402
from dynamicrad_compile.exporting.tensorrt import compile as drad_tensorrt  # noqa: E402
from dynamicrad_compile.exporting.tensorrt import kernel as tensorrt_kernel  # noqa: E402
from dynamicrad_compile.exporting.tensorrt import plugin as tensorrt_plugin  # noqa: E402
from dynamicrad_compile.exporting.tensorrt.graph import ATTENTION, PLUGIN_ATTENTION, lower  # noqa: E402
from dynamicrad_compile.kernels.ahead_of_time import Build  # noqa: E402

OPTIONS = {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "sparsity": 0.6}
SETTINGS = CompilationSettings(min_block_size=1)


@pytest.fixture(autouse=True)
def target(monkeypatch):
    monkeypatch.setattr(tensorrt_plugin.TARGET, "capability", standin.CAPABILITY)
    monkeypatch.setattr(tensorrt_plugin.TARGET, "small", False)
    standin.LAUNCHES.clear()


def parts_of(gm, dynamic=None, kwargs=None, lowered=True):
    """The parts into which Torch-TensorRT cuts a rewritten module, as for an engine: {name: graph module}."""
    if lowered:
        lower(gm)
    with torch.no_grad():
        program = torch.export.export(gm, (), kwargs, dynamic_shapes=dynamic, strict=False)
        DYNAMO_CONVERTERS.set_compilation_settings(SETTINGS)
        program = pre_export_lowering(program, SETTINGS).run_decompositions(get_decompositions(False))
        module = post_lowering(program.module(), SETTINGS)
        parts, support = partitioning.fast_partition(module, min_block_size=1)
    return {name: part for name, part in parts.named_children() if hasattr(part, "graph")}, support


def rewritten(name, dynamic=False, **options):
    model, kwargs, _ = make(name, batch=2)
    shapes = dynamic_batch(kwargs) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(model.eval(), (), kwargs, dynamic_shapes=shapes, strict=False)
    gm, report = drad.rewrite(program, {**OPTIONS, **options})
    assert len(report.replaced) > 0
    return gm, shapes, kwargs, len(report.replaced)


def targets_in(part):
    return [node.target for node in part.graph.nodes]


def build(network, builder, profiles=()):
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for profile in profiles:
        config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


def test_converters_are_registered():
    assert ATTENTION in DYNAMO_CONVERTERS
    assert PLUGIN_ATTENTION in DYNAMO_CONVERTERS


@pytest.mark.parametrize("lowered", [True, False], ids=["lowered", "as the op"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_attention_lands_in_an_engine(dynamic, lowered):
    gm, shapes, kwargs, n = rewritten("wan_t2v", dynamic, compensate=0.5)
    parts, _ = parts_of(gm, shapes, kwargs, lowered)
    inside = [name for name, part in parts.items() for t in targets_in(part) if t is PLUGIN_ATTENTION]
    assert len(inside) == n
    assert all(name.startswith("_run_on_acc") for name in inside)
    assert not any(t is ATTENTION for part in parts.values() for t in targets_in(part))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_whole_wan_becomes_one_engine(dynamic):
    """Every operation converts, each attention is a plugin with the right launch, and TensorRT-RTX builds the rest."""
    gm, shapes, kwargs, n = rewritten("wan_t2v", dynamic, compensate=0.5)
    parts, support = parts_of(gm, shapes, kwargs)
    assert not support.unsupported_operators
    (part,) = parts.values()
    interpreter = TRTInterpreter(part, partitioning.construct_submodule_inputs(part), compilation_settings=SETTINGS)
    interpreter._construct_trt_network_def()
    assert len(standin.LAUNCHES) == n
    batch, heads, tokens, dim = (64 if dynamic else 2), 2, 240, 24  # 64: the largest that dynamic_batch allows
    for launch in standin.LAUNCHES:
        assert launch.plugin == "BlockSparseAttentionMeans"
        assert launch.inputs[0] == launch.outputs[0] == (batch, heads, tokens, dim)
        assert launch.outputs[1] == (batch, heads, tokens)
        assert launch.types == [trt.float32, trt.float32]
        assert launch.grid == (tokens // 16 * batch * heads, 1, 1)
        assert launch.sizes == [tokens, tokens, 1, 1, launch.inputs[4][3], 1]
        assert launch.shared <= tensorrt_kernel.SHARED_MEMORY[89]
    engine = build(interpreter.ctx.net, interpreter.builder, interpreter.optimization_profiles or ())
    assert engine is not None
    assert engine.nbytes > 0


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_covariances_are_in_the_engine(dynamic):
    """Two plugins for each attention, for kept blocks and for means; what is between them converts, and builds."""
    gm, shapes, kwargs, n = rewritten("wan_t2v", dynamic, compensate=0.5, covariance=True)
    parts, support = parts_of(gm, shapes, kwargs)
    assert not support.unsupported_operators
    (part,) = parts.values()
    interpreter = TRTInterpreter(part, partitioning.construct_submodule_inputs(part), compilation_settings=SETTINGS)
    interpreter._construct_trt_network_def()
    plugins = ["BlockSparseAttention", "BlockSparseAttentionMeans"]
    assert sorted(launch.plugin for launch in standin.LAUNCHES) == sorted(plugins * n)
    engine = build(interpreter.ctx.net, interpreter.builder, interpreter.optimization_profiles or ())
    assert engine is not None


CASES = {
    "plain": (trt.float16, False, False, [1000, 1000, 1, 1, 5]),
    "masked": (trt.DataType.BF16, True, False, [1000, 1000, 1, 1, 5, 2]),
    "means": (trt.DataType.BF16, False, True, [1000, 1000, 1, 1, 5, 1]),
    "masked means": (trt.float32, True, True, [1000, 1000, 1, 1, 5, 2, 1]),
}
ARCHITECTURES = {(8, 0): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90a", (12, 0): "sm_120a"}


def plugin_of(masked, means, scale=0.25):
    name = tensorrt_plugin.plugin_name(masked, means)
    attributes = {"scale": scale, "block_q": 128, "block_kv": 128}
    arrays = {k: np.array([v], tensorrt_plugin.ATTRIBUTES[k]) for k, v in attributes.items()}
    creator = trt.get_plugin_registry().get_creator(name, "1", "dynamicrad")
    assert creator is not None
    fields = [type("Field", (), {"name": k, "data": v})() for k, v in arrays.items()]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin(name, "dynamicrad", fields, None, request)


BUILDS = [(capability, *which) for capability in ARCHITECTURES
          for which in (("plain", 1), ("masked means", 1), ("means", 2))] + [((9, 0), "masked", 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "case", "tactic"),
    BUILDS,
    ids=[f"{ARCHITECTURES[a]} {case} {('tile', 'small')[tactic - 1]}" for a, case, tactic in BUILDS],
)
def test_plugin_evaluates_and_ptxas_accepts_its_kernel(capability, case, tactic, monkeypatch):
    """Types, shapes, formats, grid and arguments of a plugin at 2 x 12 x 1000 x 64 with 3 key heads."""
    monkeypatch.setattr(tensorrt_plugin.TARGET, "capability", capability)
    kind, masked, means, sizes = CASES[case]
    shapes = [(2, 12, 1000, 64), (2, 3, 1000, 64), (2, 3, 1000, 64), (1, 1, 8), (1, 1, 8, 5)]
    kinds = [kind] * 3 + [trt.int32] * 2
    if masked:
        shapes, kinds = [*shapes, (2, 1000)], [*kinds, trt.int32]
    if means:
        count = (2, 8) if masked else (1, 8)
        shapes += [(2, 3, 8, 64), (2, 3, 8, 64), count, (1,), (1, 1, 8, 1)]
        kinds += [kind, kind, trt.int32, trt.float32, trt.int32]
    launch = standin.evaluate(plugin_of(masked, means), kinds, shapes, opens={(i, 0) for i in range(3)}, tactic=tactic)
    assert launch.outputs == [(2, 12, 1000, 64), (2, 12, 1000)]
    assert launch.types == [kind, trt.float32]
    assert launch.tactics == [1, 2]
    assert launch.sizes == sizes
    assert f".target {ARCHITECTURES[capability]}" in launch.ptx
    assert launch.grid[0] in (8 * 24, 2 * 8 * 24, 4 * 8 * 24)  # 8 rows of 24 heads, in 1, 2 or 4 tiles
    assert launch.grid[1:] == (1, 1)
    assert launch.threads == int(re.search(r"\.reqntid (\d+)", launch.ptx)[1])
    entry = re.search(r"\.entry " + launch.name + r"\((.*?)\n\)", launch.ptx, re.S)[1]
    assert len(entry.strip().splitlines()) == len(shapes) + len(sizes) + 2  # inputs, sizes, outputs
    if tactic == 2:
        assert launch.shared <= 48 << 10
    assert Build(launch.name, ARCHITECTURES[capability], launch.ptx, launch.shared, None).spilled == 0


def test_scale_and_architecture_are_constants_of_the_kernel(monkeypatch):
    shapes = [(1, 2, 256, 64)] * 3 + [(1, 1, 2), (1, 1, 2, 1)]
    kinds = [trt.float16] * 3 + [trt.int32] * 2
    first, second = (standin.evaluate(plugin_of(False, False, scale), kinds, shapes).ptx for scale in (0.25, 0.5))
    assert first != second
    monkeypatch.setattr(tensorrt_plugin.TARGET, "capability", (7, 5))
    with pytest.raises(drad.ExportError, match=r"8\.0 or newer, got 7\.5"):
        standin.evaluate(plugin_of(False, False), kinds, shapes)


def test_small_kernels_only(monkeypatch):
    monkeypatch.setattr(tensorrt_plugin.TARGET, "small", True)
    shapes = [(1, 2, 256, 64)] * 3 + [(1, 1, 2), (1, 1, 2, 1)]
    launch = standin.evaluate(plugin_of(False, False), [trt.float16] * 3 + [trt.int32] * 2, shapes, tactic=2)
    assert launch.tactics == [2]


@pytest.fixture
def in_pytorch(monkeypatch):
    """Torch-TensorRT's backend up to the partition; its parts then run in PyTorch. Yields the parts of each graph."""
    seen = []

    def compile_module(gm, inputs, settings=None, engine_cache=None):
        DYNAMO_CONVERTERS.set_compilation_settings(settings)
        parts, _ = partitioning.fast_partition(gm, min_block_size=1)
        seen.append({name: part for name, part in parts.named_children() if hasattr(part, "graph")})
        return parts

    monkeypatch.setattr(backends, "compile_module", compile_module)
    torch._dynamo.reset()
    return seen


def placed(parts):
    return [name for name, part in parts.items() for t in targets_in(part) if t is PLUGIN_ATTENTION]


BACKEND = {
    "static": {},
    "means": {"compensate": 0.5},
    "covariances": {"compensate": 0.5, "covariance": True},
    "dynamic": {"mode": "dynamic_threshold"},
    "state": {"mode": "dynamic_threshold", "dense_steps": 1, "refresh_steps": 2},
}


@pytest.mark.parametrize("case", BACKEND)
def test_inner_tensorrt(case, in_pytorch):
    """The graph handed to Torch-TensorRT does what the sparse model does, call after call, with its state alive."""
    options = {**OPTIONS, **BACKEND[case]}
    model, kwargs, _ = make("wan_t2v", batch=2)
    outputs = {}
    for inner in ("eager", "tensorrt"):
        compiled = drad.compile(model, **options, inner=inner, fullgraph=True)
        outputs[inner] = []
        for timestep in (900, 700, 500, 300):
            kwargs["timestep"] = torch.full_like(kwargs["timestep"], timestep)
            outputs[inner].append(call(compiled, kwargs).clone())
    for expected, actual in zip(*outputs.values(), strict=True):
        assert relative_error(actual, expected) < 1e-5
    (parts,) = in_pytorch
    assert len(placed(parts)) == (4 if case == "covariances" else 2)
    assert all(name.startswith("_run_on_acc") for name in placed(parts))
    (note,) = [note for note in drad.report(compiled).notes if note.startswith("TensorRT: ")]
    assert ("dynamicrad.select_blocks" in note) == (case == "dynamic")


def test_a_graph_that_does_not_build_runs_in_pytorch_and_is_reported(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(backends, "compile_module", fail)
    torch._dynamo.reset()
    model, kwargs, _ = make("wan_t2v")
    expected = call(torch.compile(model, backend="dynamicrad", options={**OPTIONS, "inner": "eager"}), kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="dynamicrad", options={**OPTIONS, "inner": "tensorrt"})
    assert relative_error(call(compiled, kwargs), expected) < 1e-6
    assert "no engine could be built, the graph runs in PyTorch: RuntimeError: no such luck" in str(
        drad.report(compiled)
    )
    torch._dynamo.reset()
    strict = {"inner": "tensorrt", "inner_options": {"pass_through_build_failures": True}}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such luck"):
        call(torch.compile(model, backend="dynamicrad", options={**OPTIONS, **strict}), kwargs)


@pytest.mark.parametrize("covariance", [False, True], ids=["means", "covariances"])
@pytest.mark.parametrize("batch", [False, True], ids=["static", "dynamic batch"])
def test_engine_of_the_standard_onnx_model(batch, covariance, tmp_path):
    model, kwargs, _ = make("wan_t2v", batch=2)
    options = {**OPTIONS, "compensate": 0.5, "covariance": covariance}
    found = drad.export(model.eval(), (), kwargs, tmp_path, "tensorrt", options, dynamic_batch=batch, via="trtexec")
    command, run = found.card["commands"]
    assert command.startswith("trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped")
    assert run == "trtexec --loadEngine=model.engine"
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(tmp_path / "model.onnx")), parser.get_error(0)
    profiles = []
    if batch:
        shapes = {kind: tensorrt_build.parse_shapes(re.search(rf"--{kind}Shapes=(\S+)", command)[1])
                  for kind in ("min", "opt", "max")}  # fmt: skip
        config = builder.create_builder_config()
        tensorrt_build._add_profile(builder, config, network, shapes)
        made = builder.create_optimization_profile()
        for name in shapes["min"]:
            made.set_shape(name, *(shapes[kind][name] for kind in ("min", "opt", "max")))
        profiles = [made]
    engine = build(network, builder, profiles)
    assert engine is not None
    assert engine.nbytes > 0


def test_rtx_without_plugins_says_so(monkeypatch):
    real = drad_tensorrt.importlib.util.find_spec
    monkeypatch.setattr(
        drad_tensorrt.importlib.util, "find_spec", lambda name: None if name == "tensorrt.plugin" else real(name)
    )
    with pytest.raises(drad.ExportError, match="Use torch-tensorrt instead of torch-tensorrt-rtx"):
        drad_tensorrt.register()


def test_engines_need_a_gpu(tmp_path):
    model, kwargs, _ = make("wan_t2v")
    with pytest.raises(drad.ExportError, match=r"there is none here.*via='plugin'"):
        drad.export(model, (), kwargs, tmp_path / "out", "tensorrt", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_plugin_layers_call_the_registered_plugins():
    names = {tensorrt_plugin.plugin_name(a, b) for a in (False, True) for b in (False, True)}
    assert names <= set(dir(trtp.op.dynamicrad))
