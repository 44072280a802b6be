"""The Wan example on a pipeline of one layer: what it replaces, writes and refuses; LoRAs; both ways to offload."""

from __future__ import annotations

import pytest
import torch
import wan_pipeline
from support.tiny_wan import save_lora, save_pipeline

SIZE = ["--frames", "9", "--height", "128", "--width", "128", "--steps", "2", "--device", "cpu"]
SMALL = [*SIZE, "--set", "min_tokens=0", "--set", "inner=aot_eager"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("peft")
    return save_pipeline(tmp_path_factory.mktemp("wan"))


def clips_of(argv):
    return wan_pipeline.run(wan_pipeline.Wan(wan_pipeline.parse(argv)))


@pytest.fixture
def offloads_to_the_cpu(monkeypatch):
    """diffusers sets offloading up again when it loads a LoRA, then without a device: there is no GPU to find."""
    from diffusers import WanPipeline

    enable = WanPipeline.enable_model_cpu_offload
    monkeypatch.setattr(WanPipeline, "enable_model_cpu_offload", lambda pipe, device="cpu": enable(pipe, device=device))


@pytest.mark.slow
def test_all_at_once(folder, tmp_path, capsys, offloads_to_the_cpu):
    """Dense, sparse and a swapped LoRA under model offloading; the files; and the swap is the LoRA loaded anew."""
    from PIL import Image

    first = save_lora(folder, tmp_path / "first.safetensors", rank=4, seed=1)
    second = save_lora(folder, tmp_path / "second.safetensors", rank=2, seed=2)
    out = tmp_path / "out"
    command = ["--model", str(folder), *SMALL, "--offload", "--output-dir", str(out)]
    wan_pipeline.main([*command, "--lora", str(first), str(second)])
    printed = capsys.readouterr().out
    assert printed.count("1 of 1 video self-attentions replaced") == 2  # explained before, reported behind
    assert printed.index("Before the run") < printed.index("dense: 2 steps")
    assert "0 graphs were compiled for this LoRA" in printed
    assert "x the speed of dense, a step" in printed
    assert "dB between the two clips" in printed
    with Image.open(out / "comparison.webp") as video:
        assert video.n_frames == 9
        assert video.width >= 3 * 128
    assert "blocks.0.attn1" in (out / "report.html").read_text()
    assert (out / "mask.png").is_file()

    swapped = clips_of([*command, "--no-dense", "--lora", str(first), str(second)])
    anew = clips_of([*command, "--no-dense", "--lora", str(second)])
    assert torch.allclose(swapped["sparse, second"], anew["sparse"], atol=1e-4)
    assert not torch.allclose(swapped["sparse"], anew["sparse"], atol=1e-2)


@pytest.mark.slow
def test_offloading_changes_no_pixel(folder):
    """With whole blocks offloaded attention is behind graph breaks, and sparse."""
    command = ["--model", str(folder), *SMALL, "--no-dense"]
    expected = clips_of(command)["sparse"]
    wan = wan_pipeline.Wan(wan_pipeline.parse([*command, "--offload", "blocks"]))
    assert torch.allclose(wan_pipeline.run(wan)["sparse"], expected, atol=1e-4)
    (site,) = wan.report().replaced
    assert site.grid == (3, 8, 8)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "1", "--device", "cpu"], "must be at least 2, got 1"),
        (["--sparsity", "2", "--device", "cpu"], "sparsity = 2.0"),
        (["--set", "sparsty=0.5", "--device", "cpu"], "Did you mean 'sparsity'"),
        (["--set", "sparsity", "--device", "cpu"], "expects KEY=VALUE"),
        (["--device", "cudaa"], "device 'cudaa' can't be used here"),
        (["--offload", "leaves", "--device", "cpu"], "invalid choice: 'leaves'"),
        (["--lora", "nowhere.safetensors", "--device", "cpu"], "--lora nowhere.safetensors: there is no such file"),
        (["--lora", __file__, "--device", "cpu"], "is not a safetensors file"),
        (["--output-dir", __file__, "--device", "cpu"], "is a file, not a folder"),
        pytest.param([], "there is no GPU here; --device cpu", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is a GPU")),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)  # fmt: skip
def test_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        wan_pipeline.parse(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses_a_file_without_a_lora(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        wan_pipeline.parse(["--lora", str(tmp_path / "model.safetensors"), "--device", "cpu"])
    assert "none of its 1 tensors is a lora_A or lora_down" in capsys.readouterr().err


def test_a_wrong_model_or_size_is_told_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("diffusers.WanPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for model, size, message in [
        (tmp_path, [], "there is no model_index.json in it"),
        (folder, ["--frames", "10"], r"frames must be 4 x n \+ 1 .* got 10"),
        (folder, ["--height", "100"], "height must be a multiple of 16 pixels .* got 100"),
        ("nobody/nothing", [], "is no folder, and not to be had from the hub"),
    ]:
        with pytest.raises(SystemExit, match=message):
            wan_pipeline.main(["--model", str(model), *SIZE, *size])


def test_a_lora_of_another_model_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    file = save_lora(folder, tmp_path / "lora.safetensors", rank=4, seed=1)
    wide = {key: torch.cat([value, value], dim=1) for key, value in load_file(file).items()}
    save_file(wide, file)
    with pytest.raises(SystemExit, match="does not fit this model"):
        wan_pipeline.main(["--model", str(folder), *SMALL, "--lora", str(file)])
