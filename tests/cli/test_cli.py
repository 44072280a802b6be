"""The command line: what each command prints and writes, and that a user's mistake gives a message, not a traceback."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from support.marks import fast

from dynamicrad_compile import cli
from dynamicrad_compile.cli import doctor
from dynamicrad_compile.kernels.tiles import CHOICE
from dynamicrad_compile.models.fake import build
from dynamicrad_compile.models.presets import PRESETS

SMALL = ["--frames", "17", "--height", "256", "--width", "256"]


def run(capsys, *argv):
    """Exit code, stdout and stderr of a command."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_doctor_passes_here(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0, out
    for expected in (
        "torch",
        "compiler",
        "dynamicrad::block_sparse_attention on cpu",
        'backend="dynamicrad"',
        "profiles",
    ):
        assert expected in out


def test_doctor_says_what_to_do(capsys, monkeypatch):
    def unknown_backend(name):
        raise torch._dynamo.exc.InvalidBackend(name)

    monkeypatch.setattr(torch._dynamo, "lookup_backend", unknown_backend)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "fail  torch.compile does not know" in out
    assert "-> install the package" in out
    assert "1 problem." in out


def test_doctor_says_which_kernel_runs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.delenv(CHOICE, raising=False)
    assert [str(found)[6:] for found in doctor._kernels()] == [
        "attention kernel on GPU 0: triton, chosen by the tile table"
    ]
    monkeypatch.setenv(CHOICE, "gluon")
    assert "GPU 0: gluon, chosen by DYNAMICRAD_KERNEL" in str(next(doctor._kernels()))
    monkeypatch.setenv(CHOICE, "gloun")
    (found,) = doctor._kernels()
    assert found.status == "fail"
    assert "must be triton, tma, gluon, gluon_pingpong, got 'gloun'" in found.text


@pytest.mark.parametrize("name", fast(PRESETS, {"wan-14b-i2v", "cogvideox-5b", "ltx", "sana-video"}))
def test_explain_preset(capsys, name):
    code, out, err = run(capsys, "explain", "--model", name, *SMALL, "--set", "min_tokens=0", "--json")
    assert code == 0, err
    report = json.loads(out)
    video = [site for site in report["sites"] if site["role"] == "video_self_attention"]
    assert all(site["replaced"] for site in video)
    # Sana-Video's self-attention is linear: there is no softmax to make sparse.
    assert bool(video) == (name != "sana-video")


def test_explain_takes_pixels(capsys):
    code, out, _ = run(capsys, "explain", "--model", "wan-1.3b", "--frames", "33", "--height", "240", "--width", "416")
    assert code == 0
    assert "9x15x26" in out  # 4 frames and 8 x 8 pixels a latent, patches of 2 x 2
    assert "2 of 2 video self-attentions replaced" in out


def test_explain_options_and_page(capsys, tmp_path):
    page = tmp_path / "report.html"
    options = ["--set", "sparsity=0.5", "--set", "grid=5,16,16", "--set", "regime=high", "--set", "min_tokens=100"]
    options += ["--set", "mode=static_ratio", "--set", "compensate=0"]
    code, out, _ = run(
        capsys, "explain", "--model", "WanTransformer3DModel", *SMALL, *options, "--html", str(page), "--json"
    )
    assert code == 0
    sites = [site for site in json.loads(out)["sites"] if site["replaced"]]
    assert [round(site["sparsity"], 1) for site in sites] == [0.5, 0.5]
    assert "blocks.*.attn1" in page.read_text()


@pytest.mark.parametrize("place", ["pipeline", "transformer", "file"])
def test_explain_path(capsys, tmp_path, place):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=3,
    )
    folder = tmp_path / "transformer"
    model.save_config(folder)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"scale_factor_temporal": 4, "scale_factor_spatial": 16}')
    path = {"pipeline": tmp_path, "transformer": folder, "file": folder / "config.json"}[place]
    command = ["explain", "--model", str(path), *SMALL, "--layers", "0", "--json", "--set", "min_tokens=0"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    replaced = [site for site in json.loads(out)["sites"] if site["replaced"]]
    assert [site["grid"] for site in replaced] == [[5, 8, 8]] * 3  # 16 pixels a latent, patches of 2


def test_layers_are_cut_without_weights():
    model, _ = build("hunyuan", layers=1)
    assert len(model.transformer_blocks) == len(model.single_transformer_blocks) == 1
    assert build("wan-14b", layers=0)[0].config.num_layers == 40


def test_plot_as_text(capsys, tmp_path, monkeypatch):
    code, out, _ = run(capsys, "plot", "--grid", "3", "4", "5", "--block-size", "16", "--pattern", "dense", "-o", "-")
    assert code == 0
    assert out.splitlines()[1] == "####"
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.chdir(tmp_path)
    code, same, said = run(capsys, "plot", "--grid", "3", "4", "5", "--block-size", "16", "--pattern", "dense")
    assert (code, same) == (0, out)
    assert "pip install 'pillow>=10'" in said
    assert not list(tmp_path.iterdir())


def test_plot_takes_the_parameters_of_a_pattern(capsys):
    argv = ["plot", "--grid", "9", "4", "4", "--block-size", "16", "--pattern", "lvsa", "--set", "reference_frames=4"]
    code, out, _ = run(capsys, *argv, "--set", "window=1", "--set", "step=1", "--set", "rule=exact", "-o", "-")
    assert code == 0
    assert out.splitlines()[0] == "lvsa 9x4x4: 55.6% of 9 x 9 blocks skipped"
    code, _, err = run(capsys, *argv, "--set", "stop=1", "-o", "-")
    assert code == 2
    assert "Did you mean 'step'?" in err


def test_plot_says_if_less_is_skipped_than_was_asked_for(capsys):
    code, out, _ = run(capsys, "plot", "--grid", "5", "6", "8", "--block-size", "128", "--sparsity", "0.9", "-o", "-")
    assert code == 0
    assert "note: 90.0% was asked for" in out


@pytest.mark.parametrize(
    ("ending", "begins"), [("svg", b"<svg"), ("jpg", b"\xff\xd8\xff"), ("webp", b"RIFF"), ("pdf", b"%PDF")]
)
def test_plot_writes_what_the_ending_says(capsys, tmp_path, ending, begins):
    picture = tmp_path / f"mask.{ending}"
    code, _, err = run(capsys, "plot", *GRID, "--block-size", "16", "-o", str(picture))
    assert code == 0, err
    assert picture.read_bytes().startswith(begins)


def test_plot(capsys, tmp_path):
    from PIL import Image

    picture = tmp_path / "mask.png"
    options = ["--text-before", "7", "--sparsity", "0.7", "--block-size", "16", "-o", str(picture)]
    code, out, _ = run(capsys, "plot", "--grid", "5", "6", "8", *options)
    assert code == 0
    assert "16 x 16 blocks of 16 tokens" in out
    with Image.open(picture) as image:
        assert image.format == "PNG"


GRID = ["--grid", "3", "4", "5"]
FIT = ["--fit", "--encoder"]
MID = ["--regime", "mid", "--prompt", "a"]
MISTAKES = {
    "no command": ([], "required"),
    "preset": (["explain", "--model", "wan-13b"], "Did you mean 'wan-1.3b'?"),
    "no config": (["explain", "--model", "{tmp}"], "neither transformer/config.json nor config.json"),
    "not json": (["explain", "--model", "{tmp}/broken.json"], "can't be read as JSON"),
    "not a transformer": (["explain", "--model", "{tmp}/other.json"], "holds a UNet2DModel"),
    "frames": (["explain", "--model", "wan-1.3b", "--frames", "80"], "frames must be 4 x n + 1"),
    "height": (["explain", "--model", "ltx", "--height", "500"], "multiple of 32"),
    "set": (["explain", "--model", "ltx", "--set", "sparsity"], "KEY=VALUE"),
    "option": (["explain", "--model", "ltx", "--set", "sparcity=1"], "Did you mean 'sparsity'?"),
    "grid": (["explain", "--model", "wan-1.3b", *SMALL, "--set", "grid=5,16,17"], "does not fit the 1280"),
    "page": (["explain", "--model", "wan-1.3b", *SMALL, "--html", "{tmp}/broken.json/page.html"], "File exists"),
    "pattern": (["plot", "--grid", "3", "4", "5", "--pattern", "radail"], "Did you mean 'radial'?"),
    "huge grid": (["plot", "--grid", "1000", "1000", "1000"], "7812500 blocks of 128, more than the 10000"),
    "grid of two": (["plot", "--grid", "3", "4"], "expected 3 arguments"),
    "profile": (["plot", "--grid", "3", "4", "5", "--profile", "none"], "no profile is called"),
    "output": (["plot", "--grid", "3", "4", "5", "-o", "{tmp}/no/mask.png"], "No such file"),
    "folder": (["plot", "--grid", "3", "4", "5", "-o", "{tmp}"], "is a folder: give the path of a file"),
    "ending": (["plot", "--grid", "3", "4", "5", "-o", "{tmp}/mask.txt"], "known: .svg, .png, "),
    "layers": (["explain", "--model", "ltx", "--layers", "-1"], "layers must be at least 0"),
    "heads": (["bench", "--heads", "0"], "must be at least 1"),
    "head_dim": (["bench", "--head-dim", "300"], "--head-dim must be at most 256"),
    "bench sparsity": (["bench", "--sparsity", "2"], "sparsity must be in 0..1"),
    "corpus": (["route", "--router", "{tmp}/r", "--corpus", "x.csv"], "needs --fit"),
    "router": (["route", "--router", "{tmp}/broken.json/r", *FIT, "minilm"], "is a file, not a folder"),
    "not utf-8": (["route", "--router", "{tmp}/r", *FIT, "minilm", "--corpus", "{tmp}/bytes.csv"], "can't be read"),
    "encoder": (["route", "--router", "{tmp}/r", *FIT, "{tmp}"], "folder of a diffusers pipeline"),
    "broken encoder": (["route", "--router", "{tmp}/r", *FIT, "{tmp}/pipeline"], "is not valid JSON"),
    "pipeline": (["eval", "--pipeline", "/nothing", "--prompt", "a"], "there is no model_index.json in it"),
    "eval output": (["eval", "-o", "{tmp}/broken.json"], "is a file, not a folder"),
    "method": (["eval", "--methods", "oracel"], "Did you mean 'oracle'?"),
    "eval profile": (["eval", "--profile", "none"], "no profile is called"),
    "radial sparsity": (["eval", "--methods", "radial", "--sparsity", "2"], "sparsity = 2.0"),
    "batch": (["eval", "--batch", "0"], "--batch must be at least 1"),
    "real": (["eval", "--real", "-1"], "--real must be at least 0"),
    "steps": (["eval", "--steps", "0"], "--steps must be at least 1"),
    "checkpoint": (["eval", "--checkpoint", "{tmp}/checkpoint"], "no checkpoint of the tiny video model"),
    "clips": (["eval", "--clips", "{tmp}/none.gif"], "No such file"),
    "record ending": (["record", *MID, "-o", "x.pt"], "path of a .safetensors file"),
    "record output": (["record", *MID, "-o", "{tmp}/broken.json/x.safetensors"], "is a file, not a folder"),
    "record heads": (["record", *MID, "-o", "{tmp}/x.safetensors", "--heads", "0"], "heads must be an integer"),
    "record pipeline": (["record", *MID, "-o", "{tmp}/x.safetensors", "--pipeline", "{tmp}"], "no model_index.json"),
    "record device": (
        ["record", *MID, "-o", "{tmp}/x.safetensors", "--pipeline", "{tmp}/good", "--device", "cudaa"],
        "device 'cudaa' can't be used here",
    ),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(capsys, tmp_path, argv, message):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
    for folder, file, text in (
        ("pipeline", "model_index.json", "{"),
        ("good", "model_index.json", "{}"),
        ("checkpoint", "model.safetensors", "no"),
        ("checkpoint", "config.json", "{}"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text(text)
    before = sorted(tmp_path.iterdir())
    code, _, err = run(capsys, *(text.format(tmp=tmp_path) for text in argv))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before  # nothing is half written


@pytest.mark.parametrize("argv", [["explain", "--model", "list"], ["route", "--router", "x"], ["plot", *GRID]], ids=str)
def test_an_interrupted_command_says_so_in_a_line(capsys, monkeypatch, argv):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dynamicrad_compile.cli.{argv[0]}.run", interrupted)
    code, _, err = run(capsys, *argv)
    assert code == 130
    assert err.strip() == f"dynamicrad {argv[0]}: interrupted."


def test_explain_dumps_graphs(capsys, tmp_path):
    code, out, _ = run(capsys, "explain", "--model", "wan-1.3b", *SMALL, "--dump", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["dumps"] == [str(tmp_path / "graph_000")]
