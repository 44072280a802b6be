"""The trained example: clips are what they say, training learns and resumes, the checkpoint is what was shipped."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_video import pictures, ship, train

import dynamicrad_compile as drad
from dynamicrad_compile.quality.tiny_video import data, model
from dynamicrad_compile.routing.corpus import load_prompts

# Words of the captions that the router's corpus has in another form, and those that it doesn't have.
OTHER_FORM = {
    "darts": "darting",
    "grows": "growing",
    "pulses": "pulsing",
    "quickly": "quick",
    "squashes": "squash",
    "zooms": "zoom",
}
NOT_IN_CORPUS = {"gray", "shrinks", "striped", "triangle"}


@pytest.fixture
def one_layer(monkeypatch):
    """A model that trains in no time."""
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16}
    for name, value in small.items():
        monkeypatch.setitem(model.TRANSFORMER, name, value)


def test_clips_depend_only_on_seed_and_index():
    videos, captions = data.batch(3, [5, 9], frames=6)
    assert videos.shape == (2, 3, 6, data.SIZE, data.SIZE)
    assert videos.dtype == torch.float32
    assert videos.abs().max() <= 1
    again, same = data.batch(3, [9, 4, 5], frames=6)
    assert captions == [same[2], same[0]]
    torch.testing.assert_close(videos, again[[2, 0]], rtol=0, atol=0)
    assert data.batch(4, [5])[1] != captions[:1]


def test_clips_are_the_same_on_every_machine():
    """Captions and mean colours as they were when the model was trained."""
    assert [data.clip(1, index).caption for index in range(4)] == [
        "A green circle stretches and squashes on a blue background.",
        "A yellow square grows and shrinks on a blue background.",
        "A blue circle stretches and squashes on a black background.",
        "A striped yellow triangle slides down on a green background.",
    ]
    means = data.batch(1, range(4), frames=2)[0].mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(means, torch.tensor([-0.495454, -0.432881, -0.697718, -0.551174]), rtol=0, atol=1e-5)


def test_a_longer_clip_continues_a_shorter_one():
    short, _ = data.batch(2, range(30), frames=5)
    long, _ = data.batch(2, range(30), frames=9)
    torch.testing.assert_close(long[:, :, :5], short, rtol=0, atol=0)
    rest = torch.stack([torch.from_numpy(data.render(data.clip(2, i), 4, start=5.0)) for i in range(30)])
    torch.testing.assert_close(long[:, :, 5:], rest, rtol=0, atol=1e-5)


def test_regimes_agree_with_measured_motion():
    motion = {regime: [] for regime in data.REGIMES}
    index = 0
    while min(map(len, motion.values())) < 20:
        item = data.clip(11, index)
        index += 1
        change = torch.from_numpy(data.render(item)).diff(dim=1).square().mean()
        motion[item.regime].append(change)
    low, mid, high = (torch.stack(motion[regime]).mean().item() for regime in data.REGIMES)
    assert 3 * low < mid
    assert 1.5 * mid < high


def test_captions_use_words_of_the_routers_corpus():
    text = model.TextEncoder(data.vocabulary())
    corpus = {word for prompt in load_prompts() for word in text.words(prompt.text)}
    assert set(data.vocabulary()) - corpus == NOT_IN_CORPUS | set(OTHER_FORM)
    assert set(OTHER_FORM.values()) <= corpus


def test_every_caption_can_be_encoded():
    text = model.TextEncoder(data.vocabulary())
    captions = data.captions(200) + data.captions(20, regime="high")
    assert (text.tokens(captions) != model.UNKNOWN).all()
    with pytest.raises(ValueError, match="20 words, got 21"):
        text.tokens(["red " * 21])


def test_held_out_captions_of_a_regime():
    for regime in data.REGIMES:
        phrases = [phrase.split(" {d}")[0] for phrase, _ in data.MOTIONS[regime].values()]
        assert all(any(phrase in caption for phrase in phrases) for caption in data.captions(5, regime=regime))


def test_steps_lower_the_loss_on_a_fixed_batch(tmp_path, one_layer):
    run = train.Run(tmp_path, lr=2e-3)
    batch = train.example(0, batch_size=2, frames=2, drop=0.0)
    losses = [run.train_step(batch, 1.0, run.transformer) for _ in range(20)]
    assert losses[1] < losses[0]
    assert losses[-1] < 0.9 * losses[0]
    assert run.step == 20


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, one_layer, monkeypatch, capsys):
    monkeypatch.setattr(train, "HELD_OUT", 2)
    monkeypatch.setattr(train, "LOG_STEPS", 2)
    monkeypatch.setattr(train, "held_out_loss", lambda *models, size: torch.zeros(1))
    monkeypatch.setattr(train, "show", lambda *arguments: None)
    size = ["--steps", "6", "--batch-size", "2", "--frames", "4"]
    whole = train.main(["--output", str(tmp_path / "whole"), *size])
    train.main(["--output", str(tmp_path / "parts"), *size, "--stop-after", "3"])
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "seconds": 0, "loss": 9.9}\n')  # of a run that died before it could save
    resumed = train.main(["--output", str(tmp_path / "parts"), *size])
    assert (resumed.step, whole.step) == (6, 6)
    torch.testing.assert_close(resumed.ema, whole.ema, rtol=1e-6, atol=1e-7)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert 9.9 not in [row.get("loss") for row in rows]
    assert not list(tmp_path.rglob("*.partial"))


def test_another_file_is_no_run(tmp_path, one_layer):
    run = train.Run(tmp_path, lr=1e-3)
    model.save(tmp_path / "training.safetensors", run.ema, {})
    with pytest.raises(ValueError, match=r"not written by tiny_video\.train"):
        run.resume()
    with pytest.raises(ValueError, match="not written by tiny_video"):
        model.load(tmp_path / "training.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors, which is not there"):
        model.load(tmp_path)


@pytest.mark.parametrize("argv", [["--frames", "1"], ["--steps", "0"], ["--minutes", "-1"]], ids=" ".join)
def test_training_refuses(argv, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--output", str(tmp_path), *argv])
    assert "must be" in capsys.readouterr().err


def test_ship_writes_a_checkpoint_with_its_card(tmp_path, one_layer, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(model, "sample", lambda transformer, text, captions, **_: torch.rand(len(captions), 3, 2, 8, 8))
    monkeypatch.setattr(train, "held_out_loss", lambda *models, size: torch.full((2,), 0.125))
    run = train.Run(tmp_path / "run", lr=1e-3)
    run.folder.mkdir()
    run.train_step(train.example(0, 2, 2, 0.0), 1.0, run.transformer)
    run.save()
    (run.folder / "log.jsonl").write_text('{"step": 1, "seconds": 1, "loss": 0.5}\n')
    config = ship.ship(run.folder, tmp_path / "out", "a machine")
    assert config["held_out"]["loss"] == 0.125
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("| 2 of 4, 8, 16 frames", "a machine", "0.1250", "Apache-2.0"):
        assert words in card
    transformer, _ = model.load(tmp_path / "out")
    # float16 in the file: 11 bits
    weight = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(
        transformer.get_parameter(weight), run.ema[f"transformer.{weight}"], rtol=1e-3, atol=1e-6
    )
    with Image.open(tmp_path / "out" / "samples.gif") as samples:
        assert samples.n_frames == 2


def test_comparison_has_a_column_for_each_name(tmp_path):
    from PIL import Image

    videos = torch.stack([torch.full((3, 4, 8, 8), -1.0), torch.full((3, 4, 8, 8), 1.0)])
    videos[:, :, 1] = 0.0  # pillow joins equal frames
    videos[:, :, 3] = 0.5
    pictures.comparison({"dense": videos, "sparse": -videos}, ["one", "two"], tmp_path / "c.webp", scale=2)
    with Image.open(tmp_path / "c.webp") as picture:
        assert picture.n_frames == 4
        assert picture.width >= 2 * 16
        assert picture.height == 16 + 2 * (16 + 16)


def test_checkpoint_has_the_stored_loss():
    stored = json.loads((model.CHECKPOINT / "config.json").read_text())["held_out"]
    assert (model.CHECKPOINT / "model.safetensors").stat().st_size < ship.LIMIT
    losses = train.held_out_loss(*model.load(model.CHECKPOINT), frames=stored["frames"], clips=stored["clips"])
    # Sums in another order move single losses by about 1e-6; another checkpoint by far more than 0.1 %.
    assert losses.mean().item() == pytest.approx(stored["loss"], rel=1e-3)
    assert losses.mean() < 0.12  # noise and velocity together have 1.2: it has learnt


def test_all_self_attentions_are_replaced():
    transformer, text = model.create()
    options = {"min_tokens": 0, "block_size": 32, "sparsity": 0.7, "inner": "eager"}
    compiled = torch.compile(transformer.eval(), backend="dynamicrad", options=options)
    video = torch.randn(1, 3, data.FRAMES, data.SIZE, data.SIZE)
    with torch.no_grad():
        compiled(video, timestep=torch.tensor([500.0]), encoder_hidden_states=text.encode(["red"]), return_dict=False)
    report = drad.report(compiled)
    assert len(report.replaced) == model.TRANSFORMER["num_layers"]
    assert {site.grid for site in report.replaced} == {(16, 8, 8)}
    assert {site.role for site in report.sites if not site.replaced} == {"cross_attention"}


@pytest.mark.parametrize("index", range(6))
def test_more_pixels_show_the_same_scene(index):
    small = data.render(data.clip(3, index), frames=5)
    large = data.render(data.clip(3, index), frames=5, size=2 * data.SIZE)
    assert large.shape == (3, 5, 2 * data.SIZE, 2 * data.SIZE)
    halved = large.reshape(3, 5, data.SIZE, 2, data.SIZE, 2).mean((3, 5))
    assert abs(halved - small).mean() < 0.02


def test_the_larger_checkpoint_is_sampled_at_its_size():
    from dynamicrad_compile.quality.tiny_video.subject import subject

    larger = model.CHECKPOINT.with_name("checkpoint64")
    assert model.size_of(model.CHECKPOINT) == data.SIZE
    assert model.size_of(larger) == 64
    assert subject(larger, steps=1).grid == (data.FRAMES, 16, 16)


def test_a_run_may_begin_with_a_checkpoint_at_another_size(tmp_path):
    options = ["--size", "16", "--start", str(model.CHECKPOINT), "--steps", "1", "--batch-size", "1", "--frames", "4"]
    run = train.main(["--output", str(tmp_path / "run"), *options])
    assert (run.step, model.size_of(tmp_path / "run" / "ema_latest.safetensors")) == (1, 16)
    with pytest.raises(SystemExit):
        train.parse(["--output", str(tmp_path), "--size", "30"])
