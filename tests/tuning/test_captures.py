"""Attention recorded from a running model, and the search on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import dynamicrad_compile as drad
from dynamicrad_compile import cli
from dynamicrad_compile.errors import DynamicRadError, OptionsError
from dynamicrad_compile.quality.subject import load_subject
from dynamicrad_compile.tuning.captures import load_capture, read_capture
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.sums import BlockSums
from dynamicrad_compile.tuning.task import Task

GRID = (4, 4, 6)
TOKENS = 4 * 4 * 6 + 8
SMALL = dict(block_size=16, text_after=8, budget=10, rows=40)


class Attention(nn.Module):
    """Two heads of 16 in each of `layers` attentions; layer and step are written into the values."""

    def __init__(self, layers: int = 3, scale: float | None = None) -> None:
        super().__init__()
        self.layers, self.scale = layers, scale

    def forward(self, x, timestep):
        for layer in range(self.layers):
            q, k, v = (torch.randn(len(x), 2, x.shape[1], 16) for _ in range(3))
            v[..., 0] = 10 * float(timestep) + layer
            F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return x


def run(model, steps=4, tokens=TOKENS):
    for step in range(steps, 0, -1):
        model(torch.zeros(2, tokens, 1), timestep=torch.tensor(float(step)))


def record(path, regime="mid", model=None, **more):
    model = model or Attention()
    with drad.record_attention(model, path, GRID, regime=regime, text=(0, 8), **more):
        run(model)
    return path


def test_heads_come_from_all_steps_and_layers(tmp_path):
    every = load_file(record(tmp_path / "all.safetensors", heads=1000))
    assert every["q"].shape == (4 * 3 * 2 * 2, TOKENS, 16)
    places, counts = every["v"][:, 0, 0].unique(return_counts=True)
    assert places.tolist() == sorted(10 * step + layer for step in (1, 2, 3, 4) for layer in range(3))
    assert counts.tolist() == [4] * 12
    few = load_file(record(tmp_path / "few.safetensors", heads=12))["v"][:, 0, 0]
    assert len(few) == 12
    assert len(few.unique()) > 5
    same = load_file(record(tmp_path / "same.safetensors", heads=12))["v"][:, 0, 0]
    other = load_file(record(tmp_path / "other.safetensors", heads=12, seed=1))["v"][:, 0, 0]
    assert torch.equal(few, same)
    assert not torch.equal(few, other)


def test_a_scale_of_the_model_is_kept(tmp_path):
    torch.manual_seed(0)
    plain = load_capture(read_capture(record(tmp_path / "plain.safetensors", heads=4)))
    torch.manual_seed(0)
    model = Attention(scale=0.5)
    scaled = load_capture(read_capture(record(tmp_path / "scaled.safetensors", heads=4, model=model)))
    torch.testing.assert_close(scaled[0], plain[0] * 2.0, rtol=2e-3, atol=0)  # 0.5 is twice 1 / sqrt(16)
    torch.testing.assert_close(scaled[1], plain[1])


def test_nothing_is_written_where_something_is_wrong(tmp_path):
    path = tmp_path / "a.safetensors"
    with (
        pytest.raises(DynamicRadError, match="is the token grid right"),
        drad.record_attention(model := Attention(), path, (4, 4, 7), regime="low"),
    ):
        run(model)
    with pytest.raises(AttributeError), drad.record_attention(model, path, GRID, regime="low", text=(0, 8)):
        run(model, steps=run(model, steps=1).nothing)
    with pytest.raises(OptionsError, match="Did you mean 'high'"):
        record(path, regime="hihg")
    with pytest.raises(OptionsError, match=r"\.safetensors"):
        record(tmp_path / "a.pt")
    with pytest.raises(OptionsError, match="at least 1"):
        record(path, heads=0)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(OptionsError, match="can't be read"):
        read_capture(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no file of tensors")
    with pytest.raises(OptionsError, match="can't be read"):
        read_capture(tmp_path / "text.safetensors")
    save_file({"q": torch.zeros(1, 2, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(OptionsError, match="not written by record_attention"):
        read_capture(tmp_path / "other.safetensors")
    x = torch.full((1, 2, 3), torch.inf)
    save_file({"q": x, "k": x.clone(), "v": x.clone()}, tmp_path / "inf.safetensors", {"regime": "low"})
    with pytest.raises(OptionsError, match="not finite"):
        load_capture(read_capture(tmp_path / "inf.safetensors"))


def test_a_worker_reads_the_same_file_or_none(tmp_path):
    path = tmp_path / "a.safetensors"
    found = read_capture(record(path, heads=2))
    record(path, heads=2, seed=1)
    with pytest.raises(OptionsError, match="is not the file that the search was begun with"):
        load_capture(found)
    path.unlink()
    with pytest.raises(OptionsError, match=r"can't be read on .*: No such file or directory\. Give paths at which all"):
        load_capture(found)


def test_captures_must_fit_the_task(tmp_path):
    found = read_capture(record(tmp_path / "a.safetensors", heads=2))
    given = dict(grid=GRID, head_dim=16, proxies=("captured",), captures=(found,), **SMALL)
    assert Task(**given).captures == (found,)
    with pytest.raises(OptionsError, match="of 104 tokens, but grid and text have 112"):
        Task(**{**given, "text_after": 16})
    with pytest.raises(OptionsError, match="head_dim 16, but head_dim is 32"):
        Task(**{**given, "head_dim": 32})
    with pytest.raises(OptionsError, match="belong together"):
        Task(**{**given, "proxies": ("video",)})
    with pytest.raises(OptionsError, match="belong together"):
        Task(**{**given, "captures": ()})


def test_a_third_of_a_regime_is_held_out(tmp_path):
    files = {name: record(tmp_path / f"{name}.safetensors", name[:-1], heads=2) for name in ("low1", "mid1", "mid2")}
    captures = tuple(read_capture(file) for file in files.values())
    task = Task(grid=GRID, head_dim=16, proxies=("captured",), captures=captures, **SMALL)
    numbers = {
        (regime, held_out): [number for number, _ in task.captures_of(regime, held_out)]
        for regime in ("low", "mid", "high")
        for held_out in (False, True)
    }
    assert (numbers[("low", False)], numbers[("low", True)]) == ([0], [])
    assert [task.holds_out(regime) for regime in ("low", "mid", "high")] == [False, True, True]
    assert (numbers[("mid", False)], numbers[("mid", True)]) == ([1], [2])
    assert (numbers[("high", False)], numbers[("high", True)]) == ([0, 1], [2])  # none of its own: all
    assert Objective(task, "mid").names == [("captured", 1)]
    assert Objective(task, "mid", held_out=True).names == [("captured", 2)]


def test_heads_count_alike_whatever_their_size():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 64, 8) for _ in range(3))
    mask = torch.eye(4, dtype=torch.bool)[None] | (torch.rand(3, 4, 4) > 0.5)
    sizes = torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    sums = BlockSums(q, k, v * sizes, 16, torch.arange(64))
    wanted = [float((sums.output(mask, 0.5) - sums.dense)[h].norm() / sums.dense[h].norm()) for h in range(3)]
    sums.equalise()
    found = (sums.output(mask, 0.5) - sums.dense).square().mean((1, 2))
    torch.testing.assert_close(found, torch.tensor(wanted).square(), rtol=1e-4, atol=0)
    assert sums.error(mask, 0.5) == pytest.approx(float(found.mean()) / sums.variance, rel=1e-4)


def test_search_on_captures(tmp_path, capsys):
    files = [record(tmp_path / f"{regime}.safetensors", regime, heads=3) for regime in ("low", "high")]
    match = {"heads": [2], "layers": 3}
    profile = drad.tune(GRID, tmp_path / "a.toml", captures=files, pictures=False, match=match, **SMALL)
    assert "6 heads of 16 captured in 2 runs of a model" in profile.provenance.source
    assert "proxy" not in profile.provenance.source
    assert profile.match.head_dim == 16
    err = capsys.readouterr().err
    assert "nothing is held out of low, high: one capture" in err
    assert "low_static_ratio_held_out" not in profile.provenance.loss
    assert "mid_static_ratio_held_out" in profile.provenance.loss
    record(files[0], "low", heads=3, seed=9)
    with pytest.raises(OptionsError, match="another task: captures was"):
        drad.tune(
            GRID, tmp_path / "a.toml", captures=files, progress=False, pictures=False, match=match, resume=True, **SMALL
        )


class Pipe:
    """A pipeline, as far as the commands know one."""

    def __init__(self):
        from diffusers import WanTransformer3DModel

        torch.manual_seed(0)
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=64,
        ).eval()  # fmt: skip
        self.calls = []

    def to(self, device):
        assert device == "cpu"
        return self

    @torch.no_grad()
    def __call__(self, prompt, generator, output_type, num_inference_steps=9, num_frames=8, height=8, width=12):
        self.calls.append((prompt, num_inference_steps))
        frames = torch.stack([torch.randn(4, num_frames, height, width, generator=g) for g in generator])
        text = torch.zeros(len(prompt), 5, 8)
        for step in range(num_inference_steps, 0, -1):
            timestep = torch.full((len(prompt),), 100.0 * step)
            frames = frames - self.transformer(frames, timestep, text, return_dict=False)[0] / num_inference_steps
        return type("Output", (), {"frames": frames.transpose(1, 2)[:, :, :3].sigmoid()})


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    """What is loaded from the folder `here`."""
    diffusers = pytest.importorskip("diffusers")
    made = Pipe()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda folder, **settings: made)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return made


PIPELINE = ["--pipeline", "here", "--frames", "4", "--steps", "3", "--device", "cpu", "--dtype", "float32"]


def test_record_from_a_pipeline(tmp_path, pipe, capsys):
    file = tmp_path / "high.safetensors"
    argv = ["record", *PIPELINE, "--prompt", "a", "--prompt", "b", "--regime", "high", "--heads", "5", "-o", str(file)]
    assert cli.main(argv) == 0
    assert pipe.calls == [(["a"], 1), (["a"], 3), (["b"], 3)]  # the first call traces the grid
    found = read_capture(file)
    assert (found.regime, found.heads, found.tokens, found.head_dim) == ("high", 5, 4 * 4 * 6, 16)
    assert "dynamicrad tune --grid 4 4 6 --captures" in capsys.readouterr().out
    assert cli.main(["record", *PIPELINE, "--regime", "high", "-o", str(file)]) == 2
    assert "at least one --prompt, of high motion" in capsys.readouterr().err


def test_eval_of_a_pipeline(tmp_path, pipe, capsys):
    argv = ["eval", *PIPELINE, "--prompt", "a", "--methods", "static_ratio", "--sparsity", "0.5", "-o", str(tmp_path)]
    code = cli.main([*argv, "--block-size", "16"])
    assert code == 0, capsys.readouterr().err
    assert "static_ratio" in capsys.readouterr().out
    assert (tmp_path / "clips.gif").is_file()
    assert pipe.transformer.training is False


def test_arguments_of_a_subject(capsys, tmp_path):
    assert cli.main(["eval", "--block-size", "8", "--methods", "static_ratio", "-o", str(tmp_path)]) == 2
    assert "block_size = 8: Input should be 16, 32" in capsys.readouterr().err
    assert cli.main(["eval", "--frames", "8", "-o", str(tmp_path)]) == 2
    assert "only with --pipeline" in capsys.readouterr().err
    with pytest.raises(DynamicRadError, match=r"can't be given checkpoint: .*checkpoint"):
        load_subject(f"{__name__}:no_arguments", checkpoint="x")


def no_arguments():
    raise AssertionError("never called")


def test_command(tmp_path, capsys):
    file = record(tmp_path / "a.safetensors", heads=2)
    argv = ["tune", "--grid", "4", "4", "6", "--text-after", "8", "--block-size", "16", "--budget", "10"]
    argv += ["--captures", str(file), "--no-pictures", "-o", str(tmp_path / "b.toml")]
    assert cli.main(argv) == 0
    assert drad.load_profile(tmp_path / "b.toml").block_size == 16
