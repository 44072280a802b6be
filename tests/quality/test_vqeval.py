"""VQeval's loop score against its formulas written out; clips that fail on purpose; features of CLIP."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from support.clips import back_and_forth, frozen, half_frozen, in_turn, looping, moving, noise, noisy

from dynamicrad_compile import quality
from dynamicrad_compile.cli import main
from dynamicrad_compile.errors import DynamicRadError
from dynamicrad_compile.quality import frame_features, vqeval
from dynamicrad_compile.quality.frame_features import clip_features, coarse_features, consistency
from dynamicrad_compile.quality.vqeval import sampled_frames, vqeval_loop

CLIPS = {
    "moving": moving(),
    "slow drift": moving(speed=0.3),
    "back and forth": back_and_forth(),
    "looping": looping(),
    "half frozen": half_frozen(),
    "frozen": frozen(),
    "in turn": in_turn(),
    "noise": noise(),
}


def slow(features, lengths):
    """(cycle, lag, duplicates, flow, autocorrelation) of one clip: features [F, D], lengths of the flow, in loops."""
    n = len(features)
    alike = [[float(a @ b) for b in features] for a in features]
    bands = [np.mean([alike[t][t + lag] for t in range(n - lag)]) for lag in range(1, n // 2 + 1)]
    gap = max(3, n // 10)
    best = max(range(gap, len(bands)), key=lambda place: bands[place])
    cycle = (bands[best] - np.mean(bands)) / np.std(bands) / 3 if np.std(bands) > 1e-7 else (np.mean(bands) - 0.8) / 0.2
    overall = np.mean([alike[i][j] for i in range(n) for j in range(n) if i != j])
    cycle = max(min(max(cycle, 0), 1), 0.8 if overall > 0.95 else 0.5 if overall > 0.9 else 0)
    pairs = [alike[i][j] > 0.97 for i in range(n) for j in range(i + gap, n)]
    wave = np.array(lengths) - np.mean(lengths)
    power = [abs(sum(x * np.exp(-2j * np.pi * k * t / len(wave)) for t, x in enumerate(wave))) ** 2
             for k in range(1, len(wave) // 2 + 1)]  # fmt: skip
    flow = min(max((max(power) / sum(power) - 0.3) / 0.4, 0), 1) if np.std(wave) >= 1e-6 else 0.0
    steps = [np.linalg.norm(features[t + 1] - features[t]) for t in range(n - 1)]
    steps = np.array(steps) - np.mean(steps)
    if steps @ steps < 1e-8:
        peak = 0.8
    else:
        peak = max(steps[:-lag] @ steps[lag:] / (steps @ steps) for lag in range(3, len(steps) // 2 + 1))
    return cycle, best + 1, min(1, 3 * np.mean(pairs)), flow, min(max(peak, 0), 1)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("frames", [32, 11])
def test_parts_are_the_formulas(name, frames):
    clip = CLIPS[name][:, :frames]
    found = vqeval_loop(clip)
    lengths = [vqeval.lucas_kanade(clip[0, i].double(), clip[0, i + 1].double()) for i in range(frames - 1)]
    cycle, lag, duplicates, flow, autocorrelation = slow(coarse_features(clip)[0].numpy(), lengths)
    assert float(found.cycle) == pytest.approx(cycle, abs=1e-6)
    assert int(found.lag) == lag or name in ("frozen", "in turn")  # all lags alike
    assert float(found.duplicates) == pytest.approx(duplicates)
    assert float(found.flow) == pytest.approx(flow, abs=1e-6)
    assert float(found.autocorrelation) == pytest.approx(autocorrelation, abs=1e-6)
    total = 0.35 * cycle + 0.25 * duplicates + 0.2 * flow + 0.2 * autocorrelation
    assert float(found.score) == pytest.approx(100 * (1 - total), abs=1e-3)


def test_what_each_score_gives_clips_that_fail_on_purpose():
    ours = {name: float(quality.loop_score(clip).score) for name, clip in CLIPS.items()}
    theirs = {name: float(vqeval_loop(clip).score) for name, clip in CLIPS.items()}
    alike = {name: float(consistency(clip)) for name, clip in CLIPS.items()}
    for score in (ours, theirs):
        assert score["moving"] > 20 + max(score[name] for name in ("looping", "half frozen", "frozen", "in turn"))
    assert ours["frozen"] == pytest.approx(0.0, abs=1e-6)
    assert theirs["frozen"] == pytest.approx(24.0)  # without any flow there is no period, and autocorrelation is 0.8
    assert int(vqeval_loop(CLIPS["looping"]).lag) == 8
    # What rewards likeness rewards a frozen clip most.
    assert max(alike, key=alike.get) == "frozen"
    assert alike["frozen"] == pytest.approx(1.0)
    assert alike["moving"] < alike["slow drift"] < 1.0


def test_long_clips_are_sampled_as_vqeval_does():
    assert sampled_frames(80, 16.0) == list(range(80))
    assert sampled_frames(81, 16.0) == sorted({*range(0, 81, 8), 40, 80})
    assert sampled_frames(30, 1.0) == list(range(30))  # fewer than two a second: all
    clip = moving(100, 0.2)
    sampled = clip[:, sampled_frames(100, 16.0)]
    assert float(vqeval_loop(clip, fps=16.0).score) == pytest.approx(float(vqeval_loop(sampled).score))
    with pytest.raises(DynamicRadError, match="needs 10 sampled frames, got 9"):
        vqeval_loop(moving(9))
    with pytest.raises(DynamicRadError, match="positive fps"):
        sampled_frames(10, 0.0)


def test_features_and_flow_can_be_given():
    clip = torch.cat([moving(), looping()])
    calls = []

    def flow(first, second):
        calls.append(first.shape)
        return float((second - first).abs().mean())

    found = vqeval_loop(clip, lambda clips: clips.flatten(2), flow=flow)
    assert len(calls) == 2 * 31
    for n in range(2):
        flat = torch.nn.functional.normalize(clip[n].flatten(1).double(), dim=-1).numpy()
        lengths = [float((clip[n, i + 1] - clip[n, i]).abs().mean()) for i in range(31)]
        expected = slow(flat, lengths)
        got = (found.cycle[n], found.lag[n], found.duplicates[n], found.flow[n], found.autocorrelation[n])
        assert [float(x) for x in got] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(DynamicRadError, match=r"features must be \[2, 32, D\]"):
        vqeval_loop(clip, lambda clips: clips)


def test_consistency_is_vbenchs_formula():
    clip = noisy(moving(9), 0.1)
    frames = coarse_features(clip)[0]
    expected = np.mean([(float(frames[0] @ frames[t]) + float(frames[t - 1] @ frames[t])) / 2 for t in range(1, 9)])
    assert float(consistency(clip)) == pytest.approx(expected)
    flat = torch.full((1, 4, 3, 16, 16), 0.3)
    assert float(consistency(flat)) == pytest.approx(1.0)  # without any contrast, but alike
    torch.testing.assert_close(coarse_features(clip).norm(dim=-1), torch.ones(1, 9, dtype=torch.float64))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a tiny CLIP: of its vision model, of the whole model, and what is none."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    root = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {**vision, "image_size": 32, "patch_size": 8, "projection_dim": 12}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).save_pretrained(root / "vision")
    text = {**vision, "vocab_size": 9, "max_position_embeddings": 4}
    whole = CLIPModel(CLIPConfig(vision_config=sizes, text_config=text, projection_dim=12))
    whole.save_pretrained(root / "whole")
    (root / "empty").mkdir()
    (root / "bert").mkdir()
    (root / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (root / "bare").mkdir()
    (root / "bare" / "config.json").write_text((root / "vision" / "config.json").read_text())
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text((root / "vision" / "config.json").read_text())
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, root / "broken" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(root / "vision", root / "cut")
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    return root


@pytest.mark.parametrize("kind", ["vision", "whole"])
def test_clip_features_are_the_models_embeddings(folders, kind):
    from transformers import CLIPVisionModelWithProjection

    clip = torch.cat([moving(20), looping(5, 20)])
    model = CLIPVisionModelWithProjection.from_pretrained(folders / kind).eval()
    frames = torch.nn.functional.interpolate(clip.flatten(0, 1), (32, 32), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(x)[:, None, None] for x in (frame_features.MEAN, frame_features.STD))
    with torch.no_grad():
        embeds = model(pixel_values=(frames - mean) / std).image_embeds
    expected = (embeds / embeds.norm(dim=-1, keepdim=True)).unflatten(0, (2, 20))
    features = clip_features(folders / kind)
    found = features(clip)
    torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=0)
    assert vqeval_loop(clip, features).score.shape == (2,)
    gray = clip[:, :, :1]
    torch.testing.assert_close(features(gray), features(gray.expand(-1, -1, 3, -1, -1)))
    with pytest.raises(DynamicRadError, match="1 or 3 channels, got 2"):
        features(clip[:, :, :2])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "expects the folder of a CLIP model"),
        ("empty", "expects the folder of a CLIP model"),
        ("bert", "holds a model of type 'bert'; expected 'clip'"),
        ("bare", "no weights in safetensors"),
        ("broken", "weights of a CLIP vision model, such as"),
        ("cut", "has weights that can't be read"),
    ],
)
def test_folders_that_hold_no_clip(folders, name, said):
    with pytest.raises(DynamicRadError, match=said):
        clip_features(folders / name)


def test_pixels_are_scaled_as_the_folder_says(folders):
    file = folders / "vision" / "preprocessor_config.json"
    plain = clip_features(folders / "vision")(moving(3))
    file.write_text(json.dumps({"image_mean": [0.0] * 3, "image_std": [1.0] * 3}))
    other = clip_features(folders / "vision")(moving(3))
    file.unlink()
    assert not torch.allclose(plain, other, atol=1e-3)


def test_command_shows_both_scores(folders, tmp_path, capsys):
    quality.save_gif({"x": looping()}, tmp_path / "loop.gif", scale=2)
    quality.save_gif({"x": looping(9, 9)}, tmp_path / "short.gif", scale=2)
    files = ["--clips", str(tmp_path / "loop.gif"), str(tmp_path / "short.gif")]
    assert main(["eval", *files, "--features", str(folders / "vision")]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert "VQeval" in head
    numbers = [float(x) for x in first.split()[:-1]]
    assert len(numbers) == 13
    assert 0 <= numbers[6] <= 100
    assert math.isnan(float(second.split()[6]))  # nine frames are too few
    for argv, said in ((["--features", str(tmp_path)], "CLIP model"), (["--fps", "0"], "--fps must be a positive")):
        assert main(["eval", *files, *argv]) == 2
        assert said in capsys.readouterr().err
