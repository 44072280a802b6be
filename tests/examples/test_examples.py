"""The examples at a small size: they run, replace what they should, and write their files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import multi_gpu
import pytest
import quickstart
import torch

from dynamicrad_compile.quality.tiny_video import model


@pytest.fixture
def one_layer(tmp_path, monkeypatch):
    """A checkpoint of one layer with random weights, for clips of 32x32 pixels, in place of the shipped one."""
    monkeypatch.setitem(model.TRANSFORMER, "num_layers", 1)
    transformer, text = model.create()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    model.save(tmp_path / "model.safetensors", model.state(transformer, text), {
        "transformer": model.TRANSFORMER, "vocabulary": list(text.ids),
    })  # fmt: skip
    monkeypatch.setattr(quickstart, "CHECKPOINT", tmp_path)
    monkeypatch.setitem(quickstart.OPTIONS, "min_tokens", 0)


@pytest.mark.slow
def test_quickstart(tmp_path, one_layer, capsys):
    from PIL import Image

    prompts = ["A red circle bounces quickly on a gray background.", "A blue square stands still."]
    quickstart.main(["--steps", "4", "--device", "cpu", "--output-dir", str(tmp_path), "--prompt", *prompts])
    out = capsys.readouterr().out
    assert "2 clips of 16 frames, 1,024 tokens each" in out
    assert "1 of 1 video self-attentions replaced" in out
    assert all(f"dB to the dense clip  {prompt}" in out for prompt in prompts)
    assert "a sparse step is" in out
    with Image.open(tmp_path / "comparison.webp") as video:
        assert video.n_frames == 16
    with Image.open(tmp_path / "comparison.png") as still:
        assert still.size == video.size
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.format == "PNG"
    assert "blocks.0.attn1" in (tmp_path / "report.html").read_text()


def test_quickstart_names_the_words_it_does_not_know(one_layer):
    with pytest.raises(SystemExit, match="does not know cat, surfs; its words are a, an, and, as"):
        quickstart.main(["--prompt", "A cat surfs.", "--device", "cpu"])


def test_the_demo_draws_the_blocks_that_were_chosen(one_layer):
    """Of the first prompt and each head, and as many as the sparsity says, less what covariances cost."""
    transformer, text = model.load(quickstart.CHECKPOINT)
    video = torch.randn(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    embeds = text.encode(["A red circle.", "A blue square."])
    inputs = {"hidden_states": video, "timestep": torch.full((2,), 500.0), "encoder_hidden_states": embeds}
    options = {**quickstart.OPTIONS, "sparsity": 0.6, "dense_steps": 1}
    plan = quickstart.blocks_read(transformer, options, inputs)
    assert plan.kv_indices.shape[:3] == (1, 4, 16)
    assert plan.q_len == 1024
    assert 0.6 <= plan.sparsity < 0.66
    again = quickstart.blocks_read(transformer, options, inputs)
    assert torch.equal(again.kv_counts, plan.kv_counts)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "3"], "must be at least 4"),
        (["--sparsity", "2"], "sparsity = 2.0"),
        (["--device", "cudaa"], "device 'cudaa' can't be used here"),
        (["--output-dir", __file__], "is a file, not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_quickstart_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.parse(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_lora_finetune(tmp_path, capsys):
    """All stages on a model of one layer without training: files, table, and an adapter that is resumed."""
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    import lora_finetune
    from PIL import Image

    model, data = lora_finetune.model, lora_finetune.data
    config = {**model.TRANSFORMER, "num_layers": 1}
    transformer, text = model.create(config)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    written = {"transformer": config, "vocabulary": data.vocabulary()}
    model.save(tmp_path / "model.safetensors", model.state(transformer, text), written)
    size = ["--frames", "8", "--steps", "2", "--clips", "2", "--levels", "1", "--rounds", "1", "--sample-steps", "1"]
    command = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), "--inner", "eager", *size]
    lora_finetune.main([*command, "--stages", "train", "--kinds", "sparse"])
    lora_finetune.main(command)
    out = capsys.readouterr().out
    assert "sparse LoRA, resumed" in out
    assert "sparsity that ran: 7" in out  # four fifths of the blocks, less what covariances cost at 512 tokens
    assert "The LoRA closes" in out
    assert "| dense + dense LoRA |" in out
    assert "| gain | " in out
    with Image.open(tmp_path / "out" / "comparison.gif") as video:
        assert video.size == (3 * 32 * 4, 3 * 32 * 4)
        assert video.n_frames > 1
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"sparse", "dense", "results.json", "time.json", "table.md", "curves.png", "comparison.png"}


@pytest.mark.slow
def test_multi_gpu_in_two_processes():
    """Both processes run the compiled model; the first prints what was replaced and the times of both."""
    pytest.importorskip("diffusers")
    file = Path(multi_gpu.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(file)]
    done = subprocess.run(
        [*command, "--ulysses", "2", "--small", "--layers", "1", "--steps", "2"],
        capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 1 video self-attentions replaced" in done.stdout
    assert "2 x CPU processes" in done.stdout
