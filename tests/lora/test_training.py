"""Mask-aware LoRA: gradients are those of the masked model, a regime compiles nothing, what is written loads again."""

from __future__ import annotations

import json

import pytest
import torch
from support.graphs import call, drad, first_output, make, masked_dense, relative_error
from support.plain import PLAIN

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from dynamicrad_compile import cli
from dynamicrad_compile.errors import LoraError
from dynamicrad_compile.lora import Clip, ClipFolder, Settings, finetune, load_settings
from dynamicrad_compile.lora.data import Batch, collate, order
from dynamicrad_compile.lora.losses import ask, draw_levels, held_out_losses, mean_and_error
from dynamicrad_compile.lora.student import Student
from dynamicrad_compile.profiles import REGIMES
from dynamicrad_compile.runtime.beside import PinnedState
from dynamicrad_compile.runtime.regimes import MAX_BATCH

SPARSE = {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "inner": "eager"}
CPU = torch.device("cpu")


class Clips:
    """Random clips for wan_t2v; `stop_at` raises KeyboardInterrupt when so many have been asked for."""

    def __init__(self, count: int = 5, stop_at: int | None = None) -> None:
        self.count, self.stop_at, self.asked = count, stop_at, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Clip:
        self.asked += 1
        if self.asked == self.stop_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(index)
        latents = torch.randn(4, 5, 12, 16, generator=generator)
        return Clip(latents, {"encoder_hidden_states": torch.randn(7, 16, generator=generator)}, index % 3)


def settings(output, **changes):
    train = {"steps": 4, "learning_rate": 1e-2, "warmup": 0, "eval_clips": 2, **changes.pop("train", {})}
    given = {"adapter": {"rank": 4, "alpha": 4}, "sparse": SPARSE, **changes}
    return Settings(output=str(output), train=train, **given)


def graphs_made():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def student(tmp_path, **changes):
    """A student whose adapter is not zero, as it is before training."""
    made = Student(make("wan_t2v")[0], settings(tmp_path, **changes), CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.weights.values():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return made


def question(made, count, level=0.5):
    batch = collate([Clips()[i] for i in range(count)])
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(9))
    return batch, ask(batch, torch.full((count,), level), noise, made.settings.loss)


def gradients(made, answer, target):
    return torch.autograd.grad((answer - target).square().mean(), list(made.weights.values()))


def worst(got, expected):
    return max(relative_error(a, b) for a, b in zip(got, expected, strict=True))


def masked(made, batch, asked, row, plan):
    """The uncompiled model's answer for one row, with its attention under the plan's mask."""
    conditions = {name: x[row : row + 1] for name, x in batch.conditions.items()}
    with masked_dense(plan), torch.enable_grad():
        return first_output(made.model(asked.noisy[row : row + 1], asked.timestep[row : row + 1], **conditions))


def test_gradients_are_those_of_the_masked_model_in_every_regime(tmp_path):
    """A batch with a row in each regime, then other regimes: right each time, and compiled once."""
    made = student(tmp_path)
    batch, asked = question(made, 3)
    start = graphs_made()
    for order_of_rows in ((0, 1, 2), (2, 2, 0)):
        answer = made.predict(batch, asked, torch.tensor(order_of_rows))
        got = gradients(made, answer, asked.target)
        plans = [drad.make_plan("dynamicrad", (5, 6, 8), 16, regime=REGIMES[r], profile=PLAIN) for r in order_of_rows]
        expected = torch.cat([masked(made, batch, asked, row, plan) for row, plan in enumerate(plans)])
        assert relative_error(answer, expected) < 1e-5
        assert worst(got, gradients(made, expected, asked.target)) < 1e-4
    assert graphs_made() == start + 1
    assert len(drad.report(made.compiled).replaced) == 2
    low, high = (made.predict(batch, asked, torch.full((3,), r)) for r in (0, 2))
    assert relative_error(low, high) > 1e-3


def test_the_teacher_is_the_dense_model_without_the_adapter(tmp_path):
    made = student(tmp_path, sparse={**SPARSE, "sparsity": 0.7})
    model, _, _ = make("wan_t2v")
    batch, asked = question(made, 1)
    expected = call(model, {"hidden_states": asked.noisy, "timestep": asked.timestep, **batch.conditions})
    answer = made.predict(batch, asked, torch.tensor([0]))
    assert relative_error(made.teach(batch, asked), expected) < 1e-6
    assert relative_error(made.predict(batch, asked, torch.tensor([0])), answer) == 0.0


def test_steps_above_dense_timestep_are_dense_in_training_too(tmp_path):
    made = student(tmp_path, sparse={**SPARSE, "sparsity": 0.7, "dense_timestep": 600})
    for level, dense in ((0.7, True), (0.5, False), (0.7, True)):
        batch, asked = question(made, 1, level)
        full = first_output(made.model(asked.noisy, asked.timestep, **batch.conditions))
        same = relative_error(made.predict(batch, asked, torch.tensor([1])), full) < 1e-5
        assert same == dense
    drawn = [draw_levels(4, made.settings.loss, torch.Generator().manual_seed(i), 0.6) >= 0.6 for i in range(20)]
    assert all(side.all() or not side.any() for side in drawn)
    assert len({bool(side[0]) for side in drawn}) == 2


def test_one_step_lowers_the_loss(tmp_path):
    made = Student(make("wan_t2v")[0], settings(tmp_path), CPU)
    batch, asked = question(made, 2)
    optimizer = torch.optim.AdamW(made.weights.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = (made.predict(batch, asked, torch.tensor([0, 2])) - asked.target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert all(p.grad is None for p in made.model.parameters() if not p.requires_grad)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(result, folder, graphs made after the first step) of four steps with random regimes."""
    folder = tmp_path_factory.mktemp("lora") / "out"
    changed = settings(folder, regimes={"source": "random"}, train={"batch_size": 2, "accumulate": 2, "save_every": 2})
    return finetune(make("wan_t2v")[0], Clips(), changed, Clips(3), progress=False), folder


def test_what_a_training_writes(trained):
    result, folder = trained
    assert {file.name for file in folder.iterdir()} == {"adapter", "losses.jsonl", "losses.png", "resume.safetensors"}
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert lines == result.lines
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out" in line] == [0, 4]
    assert all(line["loss"] == pytest.approx(line["flow"] + line["distill"]) for line in lines if "loss" in line)
    assert len(result.report.graphs) == 2  # with gradients, and without for the measurements
    assert [site.replaced for site in result.report.sites if site.role == "video_self_attention"] == [True] * 4


def test_round_trip(trained):
    """The file loads into a fresh model, and is what pipelines of diffusers read."""
    from diffusers import WanPipeline

    result, folder = trained
    model, kwargs, _ = make("wan_t2v")
    before = call(model, kwargs)
    model.load_lora_adapter(folder / "adapter", use_safetensors=True)
    after = call(model, kwargs)
    assert relative_error(after, call(result.model, kwargs)) < 1e-6
    assert relative_error(after, before) > 1e-3
    assert all(key.startswith("transformer.") for key in WanPipeline.lora_state_dict(folder / "adapter"))


@pytest.mark.slow
def test_swapped_in_a_compiled_model_without_compiling(trained, tmp_path):
    """Another adapter of equal rank, trained here, goes into the compiled model; and the first one back."""
    _, folder = trained
    finetune(make("wan_t2v")[0], Clips(), settings(tmp_path / "other", loss={"distill": 0}), progress=False)
    model, kwargs, _ = make("wan_t2v")
    model.load_lora_adapter(folder / "adapter", adapter_name="style", use_safetensors=True)
    compiled = torch.compile(model, backend="dynamicrad", options={**SPARSE, "sparsity": 0.6})
    outputs, seen = [call(compiled, kwargs)], graphs_made()
    for one in (tmp_path / "other", folder):
        model.load_lora_adapter(one / "adapter", adapter_name="style", use_safetensors=True, hotswap=True)
        outputs.append(call(compiled, kwargs))
    assert graphs_made() == seen
    assert relative_error(outputs[1], outputs[0]) > 1e-3
    assert torch.equal(outputs[2], outputs[0])


def test_resume_gives_what_no_interruption_would_have_given(tmp_path):
    changes = {"loss": {"distill": 0}, "train": {"batch_size": 2, "save_every": 1}}
    whole = finetune(make("wan_t2v")[0], Clips(), settings(tmp_path / "whole", **changes), progress=False)
    cut = settings(tmp_path / "cut", **changes)
    with pytest.raises(KeyboardInterrupt):
        finetune(make("wan_t2v")[0], Clips(stop_at=6), cut, progress=False)
    assert len((tmp_path / "cut" / "losses.jsonl").read_text().splitlines()) == 2
    with pytest.raises(LoraError, match="holds a training already"):
        finetune(make("wan_t2v")[0], Clips(), cut, progress=False)
    rest = finetune(make("wan_t2v")[0], Clips(), cut, resume=True, progress=False)
    assert [line["loss"] for line in rest.lines] == [line["loss"] for line in whole.lines]
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, dict(rest.model.named_parameters())[name]), name
    other = settings(tmp_path / "cut", **{**changes, "sparse": {**SPARSE, "sparsity": 0.5}})
    with pytest.raises(LoraError, match=r"other settings: sparse was"):
        finetune(make("wan_t2v")[0], Clips(), other, resume=True, progress=False)


def test_nothing_to_replace_is_an_error(tmp_path):
    changed = settings(tmp_path / "a", sparse={"inner": "eager", "min_tokens": 5000})
    with pytest.raises(LoraError, match=r"no attention became sparse[\s\S]*fewer than min_tokens"):
        finetune(make("wan_t2v")[0], Clips(), changed, progress=False)


def test_dense_lora_to_compare_with(tmp_path):
    changed = settings(tmp_path / "a", sparse={"inner": "eager", "pattern": "dense"}, train={"steps": 1})
    assert not finetune(make("wan_t2v")[0], Clips(), changed, progress=False).report.replaced


def test_regimes_by_source(tmp_path):
    batch = collate([Clips()[i] for i in range(5)])
    generator = torch.Generator().manual_seed(0)
    weight = batch.conditions["encoder_hidden_states"][:3].mean(1)
    router = drad.Router(weight, torch.zeros(3))
    chosen = {}
    for source in ("label", "router", "random", "mid"):
        made = Student.__new__(Student)
        made.settings = settings(tmp_path, sparse={**SPARSE, "router": router}, regimes={"source": source})
        made.router = router
        chosen[source] = made.regimes(batch, generator)
    assert chosen["label"].tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(chosen["router"], router.predict(batch.conditions["encoder_hidden_states"]))
    assert chosen["mid"].tolist() == [1] * 5
    made.settings = settings(tmp_path, regimes={"source": "mid", "jitter": 1.0})
    many = Batch(torch.zeros(60, 1, 1, 1, 1), {}, None)
    assert set(made.regimes(many, generator).tolist()) == {0, 1, 2}
    assert set(made.regimes(many, generator, jitter=False).tolist()) == {1}
    made.settings = settings(tmp_path)
    with pytest.raises(LoraError, match="a clip has no regime"):
        made.regimes(many, generator)


def test_pinned_state_takes_a_batch_that_fits():
    state = PinnedState()
    state.pin(torch.tensor([0, 1]), torch.tensor([3.0, 7.0]))
    assert state.regimes[:3].tolist() == [0, 1, 1]
    assert float(state.clock[0]) == 7.0
    with pytest.raises(ValueError, match="regimes must be"):
        state.pin(torch.zeros(MAX_BATCH + 1, dtype=torch.int64), torch.zeros(1))


def test_held_out_losses_are_paired_and_repeatable(tmp_path):
    loss = settings(tmp_path).loss
    seen = []

    def zero(batch, asked):
        seen.append((float(asked.timestep), asked.target))
        return torch.zeros_like(asked.target)

    first, again = (held_out_losses(zero, Clips(), loss, 4, levels=3) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (4, 3)
    assert seen[0][1].square().mean().item() == pytest.approx(first[0, 0].item(), rel=1e-6)
    assert len({timestep for timestep, _ in seen}) == 12
    mean, error = mean_and_error(first)
    assert mean == pytest.approx(first.mean().item())
    assert error == pytest.approx(first.mean(1).std().item() / 2)


def test_rising_timesteps_mirror_question_and_answer(tmp_path):
    batch, noise = collate([Clips()[0]]), torch.ones(1, 4, 5, 12, 16)
    falls = ask(batch, torch.tensor([0.3]), noise, settings(tmp_path).loss)
    rises = ask(batch, torch.tensor([0.3]), noise, settings(tmp_path, loss={"timestep_rises": True}).loss)
    assert torch.equal(falls.noisy, rises.noisy)
    assert torch.equal(falls.target, -rises.target)
    assert falls.timestep.item() == pytest.approx(300)
    assert rises.timestep.item() == pytest.approx(700)


def test_order_of_clips():
    places = list(order(5, 0, 0, 10))
    assert sorted(places[:5]) == sorted(places[5:]) == list(range(5))
    assert list(order(5, 0, 3, 8)) == places[3:8]
    assert list(order(5, 1, 0, 5)) != places[:5]


TOML = """
output = "OUT/run"
[model]
path = "OUT/model"
dtype = "float32"
[data]
clips = "OUT/clips"
[adapter]
rank = 2
[sparse]
min_tokens = 0
block_size = 16
inner = "eager"
[regimes]
source = "random"
[train]
steps = 2
"""
MISTAKES = {
    "rnak = 2": ("rank = 2", r"adapter.rnak: unknown key; .* Did you mean 'rank'\?"),
    "rank = 0": ("rank = 2", r"adapter.rank = 0: .*greater than or equal to 1"),
    "block_size = 17": ("block_size = 16", r"sparse.*: option block_size = 17"),
    "dense_steps = 4": ("block_size = 16", r"dense_steps can't be used in training: .*dense_timestep"),
    'pattern = "lvsa"': (
        "block_size = 16",
        r"pattern 'lvsa' can't be used in training: its blocks are those of a step",
    ),
    "sparsity = [[0.0, 0.0], [0.5, 0.8]]": ("block_size = 16", r"sparsity can't be a schedule by steps in training"),
    'source = "prompt"': ('source = "random"', r"regimes.source = 'prompt': .*'label'"),
    'source = "router"': ('source = "random"', r"\[sparse\] has no router"),
    "steps = ": ("steps = 2", "not valid TOML"),
    "[date]": ("[data]", "date: unknown key; .* Did you mean 'data'"),
    "[loss]\nflow = 0\ndistill = 0\n[train]": ("[train]", "both 0"),
}


@pytest.fixture
def workshop(tmp_path):
    """A folder with a model, three clips and lora.toml."""
    from safetensors.torch import save_file

    make("wan_t2v")[0].save_pretrained(tmp_path / "model")
    (tmp_path / "clips").mkdir()
    for i in range(3):
        clip = Clips()[i]
        save_file({"latents": clip.latents, **clip.conditions}, tmp_path / "clips" / f"{i}.safetensors")
    (tmp_path / "lora.toml").write_text(TOML.replace("OUT", str(tmp_path)))
    return tmp_path


def test_command(workshop, capsys):
    command = ["lora", "--config", str(workshop / "lora.toml")]
    assert cli.main([*command, "--check"]) == 0
    assert "3 clips of {'latents': [4, 5, 12, 16]" in capsys.readouterr().out
    assert not (workshop / "run").exists()
    assert cli.main(command) == 0
    assert "2 of 2 video self-attentions replaced" in capsys.readouterr().out
    assert (workshop / "run/adapter/pytorch_lora_weights.safetensors").is_file()
    assert cli.main(command) == 2
    assert "holds a training already" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", MISTAKES, ids=str)
def test_mistakes_in_settings(wrong, tmp_path):
    right, message = MISTAKES[wrong]
    assert right in TOML
    (tmp_path / "lora.toml").write_text(TOML.replace(right, wrong))
    with pytest.raises(LoraError, match=message):
        load_settings(tmp_path / "lora.toml")


def test_mistakes_in_clips_and_models(workshop, tmp_path, capsys):
    from safetensors.torch import save_file

    with pytest.raises(LoraError, match=r"no \.safetensors file"):
        ClipFolder(workshop)
    save_file({"latents": torch.zeros(4, 5, 12, 16), "regime": torch.tensor(7)}, workshop / "clips" / "0.safetensors")
    with pytest.raises(LoraError, match="must be 0, 1 or 2"):
        ClipFolder(workshop / "clips")[0]
    save_file({"video": torch.zeros(4)}, workshop / "clips" / "0.safetensors")
    with pytest.raises(LoraError, match="must hold `latents`"):
        ClipFolder(workshop / "clips")[0]
    (workshop / "clips" / "0.safetensors").write_bytes(b"no")
    with pytest.raises(LoraError, match="is not a safetensors file"):
        ClipFolder(workshop / "clips")[0]
    with pytest.raises(LoraError, match="must have the same shapes"):
        collate([Clip(torch.zeros(4, 5, 2, 2), {}), Clip(torch.zeros(4, 6, 2, 2), {})])
    with pytest.raises(LoraError, match=r"adapter\.targets"):
        Student(make("wan_t2v")[0], settings(tmp_path, adapter={"targets": ["to_nothing"]}), CPU)
    clip = Clips()[0]
    save_file({"latents": clip.latents, **clip.conditions}, workshop / "clips" / "0.safetensors")
    (workshop / "model" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    assert cli.main(["lora", "--config", str(workshop / "lora.toml"), "--check"]) == 2
    assert "no transformer of diffusers that can hold a LoRA" in capsys.readouterr().err


CHECKED = {
    "output": ("OUT/run", "OUT/lora.toml/run", "is a file, not a folder"),
    "target": ("rank = 2", 'targets = ["to_q", "to_kk"]', r"no layer 'to_kk'. Did you mean 'to_k'"),
    "label": ('source = "random"', 'source = "label"', "the first clip has no regime"),
}


@pytest.mark.parametrize(("right", "wrong", "message"), CHECKED.values(), ids=CHECKED)
def test_check_tells_what_would_stop_the_training(workshop, right, wrong, message, capsys):
    assert right in TOML
    (workshop / "lora.toml").write_text(TOML.replace(right, wrong).replace("OUT", str(workshop)))
    assert cli.main(["lora", "--config", str(workshop / "lora.toml"), "--check"]) == 2
    assert message in capsys.readouterr().err
    assert not (workshop / "run").exists()


def test_check_tells_of_conditions_that_the_model_does_not_take(workshop, capsys):
    from safetensors.torch import save_file

    clip = Clips()[0]
    save_file({"latents": clip.latents, "prompt": torch.zeros(3, 4)}, workshop / "clips" / "0.safetensors")
    assert cli.main(["lora", "--config", str(workshop / "lora.toml"), "--check"]) == 2
    assert "can't be called with the clip's conditions ['prompt']" in capsys.readouterr().err
    assert cli.main(["lora", "--config", str(workshop / "lora.toml"), "--resume"]) == 2
    assert "there is no training to go on with" in capsys.readouterr().err
