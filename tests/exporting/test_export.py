"""Exports: written whole or not at all, equal to the rewritten model in a fresh process, with a card beside them."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from pathlib import Path

import pytest
import torch
from support.graphs import call, drad, relative_error
from support.marks import fast
from zoo.exports import COMMON, FORMATS, MODELS, Row, cases, make, options_of, run_case, with_prompts

from dynamicrad_compile.exporting import api
from dynamicrad_compile.exporting.onnx import model as onnx_model

pytest.importorskip("onnxruntime")


def is_tested(row):
    """Each format with each model and with each mode, but not all pairs.

    Mode dynamic has a router too. AOTInductor compiles for half a minute, and its graphs are those of format torch.
    """
    if row.format == "aoti":
        return (row.mode == "dynamic") == (row.model in ("hunyuan", "cogvideox"))
    return row.mode != "router" or row.model in ("wan", "cogvideox")


ROWS = [row for row in cases(list(FORMATS), list(MODELS)) if is_tested(row)]
QUICK = [Row("onnx", "wan", "dynamic", "open")]


@pytest.mark.parametrize("row", fast(ROWS, QUICK), ids=lambda row: f"{row.format}-{row.model}-{row.mode}-{row.batch}")
def test_every_case_of_the_table(row):
    """With an open batch, different prompts take different regimes, and 1, 2 and 3 rows are equal to eager code.

    Each format and model runs in a fresh process once, with the plan that is known when it is exported.
    """
    run_case(row, fresh=row.batch != "open")
    assert row.error < 1e-4, row
    assert row.moved > 1e-3, row  # the plan is at work
    assert not row.replaced.startswith("0")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An ONNX export of one Wan layer, with a name of its own."""
    folder = tmp_path_factory.mktemp("onnx")
    model, kwargs = make("wan", 1)
    lines: list[str] = []
    result = drad.export(
        model, (), kwargs, folder / "wan.onnx", "onnx", options_of("static")[0], progress=lines.append, opset=21
    )
    return result, lines


def test_files_and_card(exported):
    result, lines = exported
    folder = result.path.parent
    names = ["wan.json", "wan.onnx", "wan.onnx.data", "wan.trt.onnx"]
    assert sorted(file.name for file in folder.iterdir()) == names == sorted(file.name for file in result.files)
    card = json.loads((folder / "wan.json").read_text())
    assert card == json.loads(json.dumps(result.card))
    assert card["grids"] == [[5, 6, 9]]
    assert 0.2 < card["sparsity"] < 1
    assert card["options"] == {**COMMON, "regime": "high", "dense_steps": 0}
    assert (card["format"], card["opset"], card["onnx_nodes"]) == ("onnx", 21, ["BlockSparseAttention"])
    assert card["inputs"]["hidden_states"] == {"dtype": "float32", "shape": [1, 4, 5, 12, 18]}
    assert card["versions"]["torch"] == importlib.metadata.version("torch")
    assert [site["replaced"] for site in card["sites"]] == [True, False]
    assert any("1 of 1 video self-attentions replaced" in line for line in lines)
    assert "wan.onnx" in str(result)


def test_onnx_files_differ_in_function_bodies_alone(exported):
    import onnx

    result, _ = exported
    folder = result.path.parent
    with_body, without = (onnx.load(folder / name, load_external_data=False) for name in ("wan.onnx", "wan.trt.onnx"))
    assert [function.name for function in with_body.functions] == ["BlockSparseAttention", "AttentionOfRows"]
    assert not without.functions
    assert with_body.graph == without.graph
    (node,) = (node for node in without.graph.node if node.domain == "dynamicrad")
    assert node.name == "blocks.0.attn1/BlockSparseAttention"
    assert {attribute.name for attribute in node.attribute} == {"scale", "block_q", "block_kv"}
    assert len(node.input) == 7
    assert str(Path.home()).encode() not in (folder / "wan.onnx").read_bytes()  # no stack traces
    assert any(tensor.external_data for tensor in with_body.graph.initializer)


@pytest.mark.slow
def test_onnx_with_covariances(tmp_path):
    model, kwargs = make("wan", 1)
    options = {**COMMON, "sparsity": 0.7, "compensate": 1.0, "covariance": True}
    done = drad.export(model, (), kwargs, tmp_path, "onnx", options, dynamic_batch=True, check=True)
    assert done.card["onnx_nodes"] == ["SecondOrderAttention"]
    assert done.card["check"]["relative_error"] < 1e-5


def test_program_keeps_dense_steps(tmp_path):
    """A torch.export program has a memory: the first steps are dense, as by the backend."""
    model, kwargs = make("wan", 1)
    result = drad.export(model, (), kwargs, tmp_path, options={**COMMON, "dense_steps": 2})
    loaded = torch.export.load(result.path).module()
    errors = []
    for step in (900.0, 800.0, 700.0):
        kwargs["timestep"] = torch.full((1,), step)
        errors.append(relative_error(call(loaded, kwargs), call(model, kwargs)))
    assert max(errors[:2]) < 1e-5
    assert errors[2] > 1e-3


def test_model_is_left_as_it_was(tmp_path):
    model, kwargs = make("wan", 1)
    model.train()
    drad.export(torch.compile(model), (), kwargs, tmp_path / "new" / "folder", options=COMMON)
    assert model.training
    assert (tmp_path / "new" / "folder" / "model.pt2").is_file()


def test_an_export_in_which_nothing_is_sparse_says_so(tmp_path):
    model, kwargs = make("wan", 1)
    lines = []
    result = drad.export(model, (), kwargs, tmp_path, options={**COMMON, "min_tokens": 10**6}, progress=lines.append)
    said = "nothing in what is exported is sparse: 0 of 1 video self-attentions were replaced"
    assert f"note: {said}" in lines
    assert said in str(result)
    assert said in result.card["notes"]
    strict = {**COMMON, "min_tokens": 10**6, "strict": True}
    with pytest.raises(drad.StrictError, match=r"blocks\.0\.attn1 stays dense"):
        drad.export(model, (), kwargs, tmp_path / "strict", options=strict)
    with pytest.raises(drad.StrictError, match="0 of 0 video self-attentions were replaced"):
        drad.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), {}, tmp_path / "strict", options={"strict": True})
    assert not (tmp_path / "strict").exists()


MISTAKES = {
    "format": ({"format": "onxx"}, "unknown format 'onxx'. Did you mean 'onnx'?"),
    "setting": ({"opset": 18}, "format 'torch' has no setting 'opset'. Known: none"),
    "spelling": ({"format": "onnx", "opsett": 18}, "Did you mean 'opset'?"),
    "opset": ({"format": "onnx", "opset": 17}, "opset must be 18 to 23, got 17"),
    "option": ({"options": {"sparcity": 1}}, "Did you mean 'sparsity'?"),
    "path": ({"path": "{file}/deeper"}, "is a file"),
    "ending": ({"path": "wan.onnx"}, "format 'torch' writes .pt2 files"),
    "foreign ending": ({"path": "wan.pt", "format": "onnx"}, "format 'onnx' writes .onnx files"),
    "int8": ({"format": "onnx", "options": {"qk_dtype": "int8"}}, "qk_dtype = 'int8' has no node"),
    "state": ({"format": "onnx", "options": {"dense_steps": 3}}, "dense_steps = 3 needs a memory"),
    "refresh": ({"format": "onnx", "options": {"refresh_steps": 2}}, "use format 'torch' or 'aoti'"),
    "profile": ({"format": "onnx", "options": {"profile": "{profile}"}}, "wants 5 dense steps"),
    "batch": ({"dynamic_batch": ["hidden_state"]}, "no tensor of the call. Did you mean 'hidden_states'?"),
    "batches": ({"dynamic_batch": ["hidden_states", "scale_table"]}, "no tensor of the call"),
    "model": ({"model": len}, "must be a torch.nn.Module, got builtin_function_or_method"),
    "call": ({"kwargs": {}}, "torch.export can't capture WanTransformer3DModel"),
    "grid": ({"options": {**COMMON, "grid": (5, 6, 7)}}, "does not fit the 270"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path, change, message):
    (tmp_path / "file").write_text("")
    profile = (Path(drad.__file__).parents[1] / "profiles" / "ltx.toml").read_text()
    (tmp_path / "own.toml").write_text(profile.replace("dense_steps = 0", "dense_steps = 5"))
    model, kwargs = make("wan", 1)
    given = {"model": model, "kwargs": kwargs, "path": "{tmp}/out", "options": COMMON, **change}
    places = {"tmp": tmp_path, "file": tmp_path / "file", "profile": tmp_path / "own.toml"}
    given["path"] = given["path"].format(**places)
    given["options"] = {
        key: value.format(**places) if isinstance(value, str) else value for key, value in given["options"].items()
    }
    before = sorted(tmp_path.iterdir())
    with pytest.raises(drad.DynamicRadError) as caught:
        drad.export(**given)
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_model, "_installed", lambda name: name != "onnxscript")
    with pytest.raises(drad.ExportError, match=r"needs onnxscript: pip install 'onnxscript>=0.5'"):
        drad.export(torch.nn.Linear(1, 1), (torch.zeros(1),), path=tmp_path, format="onnx")


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fails(job):
        (job.folder / "model.pt2").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr("dynamicrad_compile.exporting.torch_program.write", fails)
    model, kwargs = make("wan", 1)
    with pytest.raises(RuntimeError, match="disk full"):
        drad.export(model, (), kwargs, tmp_path / "a" / "b", options=COMMON)
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("dynamicrad_compile.exporting.checking.TOLERANCE", {torch.float32: 0.0})
    monkeypatch.setattr(
        "dynamicrad_compile.exporting.checking.run_fresh", lambda *args: ([torch.zeros(1, 4, 5, 12, 18)], {})
    )
    model, kwargs = make("wan", 1)
    with pytest.raises(drad.ExportError, match=r"differs from the rewritten one by 1\.0e\+00"):
        drad.export(model, (), kwargs, tmp_path / "out", options=COMMON, check=True)
    assert not list(tmp_path.iterdir())


def test_dynamic_grid_is_refused_by_onnx(tmp_path):
    model, kwargs = make("wan", 1)
    frames = torch.export.Dim("frames", min=2, max=32)
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            kwargs,
            dynamic_shapes={name: {2: frames} if name == "hidden_states" else None for name in kwargs},
        )
    module, _ = drad.rewrite(program, COMMON)
    from dynamicrad_compile.exporting.onnx.nodes import with_onnx_nodes

    with pytest.raises(drad.ExportError, match="export one model for each resolution"):
        with_onnx_nodes(module)


def test_export_stays_the_function_whatever_is_imported():
    import dynamicrad_compile.exporting.job
    from dynamicrad_compile.exporting import export

    assert dynamicrad_compile.exporting.job.Job
    assert drad.export is export
    assert list(inspect.signature(drad.export).parameters)[:5] == ["model", "args", "kwargs", "path", "format"]


def test_prompts_take_different_regimes():
    _, router = options_of("router")
    _, kwargs = make("wan", 3)
    assert router.predict(with_prompts(kwargs, router)["encoder_hidden_states"]).tolist() == [0, 2, 1]


def test_formats_are_modules_with_one_shape():
    for format in ("torch", "aoti", "onnx"):
        writer, folder, stem = api.check_request(format, "out", {})
        assert callable(writer.write)
        assert (folder, stem) == (Path("out"), "model")
