"""`dynamicrad export`: a folder with weights becomes a checked file, and mistakes give a message."""

from __future__ import annotations

import json

import pytest
import torch
from support.graphs import call, drad, relative_error

from dynamicrad_compile import cli

SMALL = ["--frames", "17", "--height", "128", "--width", "128"]  # 5 x 8 x 8 tokens


def run(capsys, *argv):
    """Exit code, stdout and stderr of a command."""
    code = cli.main(["export", *argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline folder with one Wan layer, and that model."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(3)
    sizes = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16)
    model = WanTransformer3DModel(**sizes, ffn_dim=32, num_layers=1).eval()
    folder = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(folder / "transformer")
    return folder, model


@pytest.mark.slow
def test_folder_with_weights(capsys, tmp_path, pipeline):
    folder, model = pipeline
    options = ["--set", "min_tokens=0", "--set", "block_size=16", "--dynamic-batch", "--check"]
    code, out, err = run(
        capsys, "--model", str(folder), *SMALL, "--format", "torch", "-o", str(tmp_path / "out"), *options
    )
    assert code == 0, err
    file = tmp_path / "out" / "model.pt2"
    for expected in ("1 of 1 video self-attentions replaced", "relative error", f"wrote {file}"):
        assert expected in out
    assert "random" not in out
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["grids"] == [[5, 8, 8]]
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    inputs = {
        "hidden_states": torch.randn(3, 4, 5, 16, 16),
        "timestep": torch.full((3,), 700.0),
        "encoder_hidden_states": torch.randn(3, 512, 16),
        "return_dict": False,
    }
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
    sparse, _ = drad.rewrite(program, {"min_tokens": 0, "block_size": 16})
    assert relative_error(call(loaded, inputs), call(sparse, inputs)) < 1e-5


MISTAKES = {
    "format": (["--model", "ltx", "--format", "onxx"], "Did you mean 'onnx'?"),
    "opset": (["--model", "ltx", "--with", "opset=7"], "opset must be 18 to 23, got 7"),
    "option": (["--model", "ltx", "--set", "sparcity=1"], "Did you mean 'sparsity'?"),
    "dtype": (["--model", "ltx", "--dtype", "float8"], "unknown dtype 'float8'"),
    "model": (["--model", "wan-13b"], "Did you mean 'wan-1.3b'?"),
    "frames": (["--model", "ltx", "--frames", "80"], "frames must be 8 x n + 1"),
    "no weights": (["--model", "{tmp}/bare", *SMALL], "has no *.safetensors"),
    "output": (["--model", "ltx", "-o", "{tmp}/bare/config.json/out"], "is a file"),
    "device": (["--model", "ltx", "--device", "cudaa"], "device 'cudaa' can't be used here"),
    "device without memory": (["--model", "ltx", "--device", "meta"], "hold no values"),
    "layers": (["--model", "ltx", "--layers", "-1"], "layers must be at least 0"),
    "state": (["--model", "ltx", "--set", "dense_steps=3"], "needs a memory from step to step"),
    "check": (["--model", "ltx", "--format", "tensorrt", "--with", "via=plugin", "--check"], "can't be run here"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(capsys, tmp_path, argv, message):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    code, _, err = run(capsys, "-o", str(tmp_path / "out"), *(text.format(tmp=tmp_path) for text in argv))
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
