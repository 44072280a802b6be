"""Mask-aware LoRA on the tiny video model, at twice the length that it was trained for.

    python examples/lora_finetune.py --checkpoint examples/tiny_video/checkpoint

Four stages, each of which can be run alone with --stages and goes on where it was interrupted:

    train     two adapters of equal rank on equal clips: through the mask (sparse/), and dense to compare with (dense/)
    measure   loss on held-out clips, the same clips, noise and noise levels for all: results.json, table.md, curves.png
    time      seconds of a training step, sparse and dense in turns: time.json
    show      the same prompts dense, sparse, and sparse with the adapter, side by side: comparison.gif

The library part is `dynamicrad_compile.lora`; the command `dynamicrad lora` trains other models (docs/lora.md).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tiny_video import pictures
from torch import Tensor

import dynamicrad_compile as drad
from dynamicrad_compile.beforehand import output_folder
from dynamicrad_compile.files import write_file
from dynamicrad_compile.lora import Clip, Settings, finetune
from dynamicrad_compile.lora.data import Batch, collate
from dynamicrad_compile.lora.losses import Question, ask, held_out_losses, mean_and_error
from dynamicrad_compile.lora.student import ADAPTER, Student
from dynamicrad_compile.quality.tiny_video import data, model

TRAIN_SEED, TRAIN_CLIPS = 2, 4096  # other clips than those the model was trained on
PROFILE = Path(__file__).parent / "lora_profile.toml"
STAGES = ("train", "measure", "time", "show")
KINDS = ("sparse", "dense")
CPU = torch.device("cpu")


class TinyClips:
    """Clips of the data set `seed` with their captions and regimes; every `drop`-th has no caption, for guidance."""

    def __init__(self, text: Any, seed: int, count: int, frames: int, drop: int = 0) -> None:
        self.text, self.seed, self.count, self.frames, self.drop = text, seed, count, frames, drop

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Clip:
        clip = data.clip(self.seed, index)
        caption = "" if self.drop and index % self.drop == self.drop - 1 else clip.caption
        with torch.no_grad():
            embeds = self.text.encode([caption])[0]
        video = torch.from_numpy(data.render(clip, self.frames))
        return Clip(video, {"encoder_hidden_states": embeds}, data.REGIMES.index(clip.regime))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="folder or .safetensors file of the tiny video model")
    parser.add_argument("--output", type=Path, default=Path("outputs/lora"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="adapters to train (both)")
    parser.add_argument("--frames", type=int, default=2 * data.FRAMES, help=f"of a clip ({2 * data.FRAMES})")
    parser.add_argument("--profile", default=str(PROFILE), help="of the mask; 85, 80, 75 %% for low, mid, high motion")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--covariance", action=flag, default=True, help="dropped blocks by covariances too (yes)")
    parser.add_argument("--steps", type=int, default=1450, help="training steps (1450)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--flow", type=float, default=0.5, help="weight of the flow-matching loss (0.5)")
    parser.add_argument("--distill", type=float, default=1.0, help="weight of the distance to the dense teacher (1)")
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--eval-clips", type=int, default=16, help="held-out clips of a measurement on the way (16)")
    parser.add_argument("--clips", type=int, default=32, help="held-out clips of the measurement (32)")
    parser.add_argument("--levels", type=int, default=2, help="noise levels of each (2)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side that are timed (7)")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--inner", default="inductor", help="backend behind ours (inductor; aot_eager compiles faster)")
    args = parser.parse_args(argv)
    try:
        output_folder(args.output)
        drad.Options(profile=args.profile, inner=args.inner)
    except drad.DynamicRadError as error:
        parser.error(str(error))
    if not Path(args.checkpoint).exists():
        parser.error(f"--checkpoint: there is no {args.checkpoint}")
    return args


def settings(args: argparse.Namespace, kind: str) -> Settings:
    """Settings of the adapter that is trained "sparse" or "dense"; all but the mask is the same."""
    sparse: dict[str, Any] = {"pattern": "dense"} if kind == "dense" else {"profile": args.profile, "min_tokens": 0}
    if args.covariance and kind == "sparse":
        sparse["covariance"] = True
    return Settings(
        output=str(args.output / kind),
        adapter={"rank": args.rank, "alpha": float(args.rank)},
        sparse={**sparse, "inner": args.inner},
        regimes={"source": "label"},
        # The dense LoRA has a teacher to learn nothing from: at first it is that teacher.
        loss={
            "flow": args.flow if kind == "sparse" else 1.0,
            "distill": args.distill if kind == "sparse" else 0.0,
            "shift": model.SHIFT,
        },
        train={
            "steps": args.steps,
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "eval_every": args.eval_every,
            "eval_clips": args.eval_clips,
            "warmup": min(20, args.steps // 10),
            "save_every": 50,
        },
    )


def train(args: argparse.Namespace) -> None:
    """Both adapters, one after the other; one that is finished is left alone."""
    for kind in args.kinds:
        wanted = settings(args, kind)
        transformer, text = model.load(args.checkpoint)
        clips = TinyClips(text, TRAIN_SEED, TRAIN_CLIPS, args.frames, drop=10)
        held_out = TinyClips(text, data.HELD_OUT_SEED, args.clips, args.frames)
        resume = (args.output / kind / "resume.safetensors").exists()
        print(f"\n{kind} LoRA" + (", resumed" if resume else ""))
        result = finetune(transformer, clips, wanted, held_out, resume)
        print(result.report.summary())


def student(args: argparse.Namespace, kind: str = "sparse") -> tuple[Student, Any]:
    """The model with a new adapter, compiled, in eval mode, and its text encoder."""
    transformer, text = model.load(args.checkpoint)
    made = Student(transformer, settings(args, kind), CPU)
    transformer.eval()
    return made, text


def put(made: Student, folder: Path) -> None:
    """Swap the trained adapter into the compiled model; nothing is compiled again."""
    made.model.load_lora_adapter(folder / "adapter", adapter_name=ADAPTER, use_safetensors=True, hotswap=True)


def measure(args: argparse.Namespace, made: Student, text: Any) -> dict[str, Tensor]:
    """Losses [clips, levels] on held-out clips by variant; the adapters are swapped into one compiled model."""

    def sparse(batch: Batch, question: Question) -> Tensor:
        assert batch.regime is not None
        return made.predict(batch, question, batch.regime)

    def dense(batch: Batch, question: Question) -> Tensor:
        out: Tensor = made.model(question.noisy, timestep=question.timestep, **batch.conditions, return_dict=False)[0]
        return out

    def loss(call: Any, frames: int) -> Tensor:
        clips = TinyClips(text, data.HELD_OUT_SEED, args.clips, frames)
        return held_out_losses(call, clips, made.settings.loss, args.clips, args.levels)

    found = {f"dense, {data.FRAMES} frames": loss(made.teach, data.FRAMES)}
    found["dense"] = loss(made.teach, args.frames)
    found["sparse"] = loss(sparse, args.frames)
    put(made, args.output / "sparse")
    found["sparse + LoRA"] = loss(sparse, args.frames)
    found["dense + the same LoRA"] = loss(dense, args.frames)
    if (args.output / "dense" / "adapter").exists():
        put(made, args.output / "dense")
        found["dense + dense LoRA"] = loss(dense, args.frames)
        found["sparse + dense LoRA"] = loss(sparse, args.frames)
    return found


def difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Mean of first - second and its standard error over clips, paired."""
    return mean_and_error(first - second)


def tell(args: argparse.Namespace, found: dict[str, Tensor], sparsity: float) -> str:
    """The table of losses, and what the adapter closes of the gap, as Markdown."""
    lines = [
        f"{args.clips} held-out clips at {args.levels} noise levels each, {args.frames} frames but where said; "
        f"sparsity that ran: {sparsity:.1%}",
        "",
        "| | loss | standard error | less sparse (paired) | less dense (paired) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, losses in found.items():
        mean, error = mean_and_error(losses)
        cells = [f"{mean:.5f}", f"{error:.5f}"]
        for other in ("sparse", "dense"):
            if name == other or "frames" in name:
                cells.append("")
            else:
                cells.append("{:+.5f} ± {:.5f}".format(*difference(losses, found[other])))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    gap = difference(found["sparse"], found["dense"])[0]
    won = difference(found["sparse"], found["sparse + LoRA"])[0]
    lines += ["", f"The LoRA closes {won / gap:.0%} of the gap between sparse and dense ({won:.5f} of {gap:.5f})."]
    if "dense + dense LoRA" in found:
        tuned = difference(found["sparse"], found["dense + dense LoRA"])[0]
        lines.append(f"Of the gap to a dense model with a LoRA of its own ({tuned:.5f}) it closes {won / tuned:.0%}.")
    return "\n".join(lines)


def plot(args: argparse.Namespace, found: dict[str, Tensor]) -> None:
    """The held-out loss of all variants as bars, and the loss in training of both adapters: curves.png."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for kind, color in zip(KINDS, ("#2a78b5", "#777777"), strict=True):
        if not (args.output / kind / "losses.jsonl").exists():
            continue
        lines = [json.loads(line) for line in (args.output / kind / "losses.jsonl").read_text().splitlines()]
        flow = [(line["step"], line["flow"]) for line in lines if "flow" in line]
        width = max(1, len(flow) // 12)
        smooth = [(s, sum(f for _, f in flow[i - width + 1 : i + 1]) / width) for i, (s, _) in enumerate(flow)][width:]
        left.plot(*zip(*smooth, strict=True), color=color, alpha=0.5, label=f"{kind} LoRA, training")
        held = [(line["step"], *line["held_out"]) for line in lines if "held_out" in line]
        steps, means, _ = zip(*held, strict=True)
        left.plot(steps, means, "o-", color=color, label=f"{kind} LoRA, held out")
    left.set(xlabel="step", ylabel="flow-matching loss", yscale="log", title=f"training at {args.frames} frames")
    left.grid(alpha=0.25, which="both")
    left.legend(fontsize=8)
    names = [name for name in found if "the same" not in name and name != "sparse + dense LoRA"]
    colors = {"sparse": "#b5322a", "sparse + LoRA": "#2a78b5"}
    for place, name in enumerate(names):
        mean, error = mean_and_error(found[name])
        right.bar(place, mean, yerr=error, capsize=3, color=colors.get(name, "#999999"))
        right.text(place, mean + error, f"{mean:.3f}", ha="center", va="bottom", fontsize=8)
    right.set_xticks(range(len(names)), [name.replace(", ", "\n").replace(" + ", "\n+ ") for name in names], fontsize=8)
    right.set(title="held-out loss")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_file(args.output / "curves.png", buffer.getvalue())


def time_steps(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward of a training step, sparse and dense in turns, and of the teacher; the best."""
    sides = {}
    for kind in KINDS:
        made, text = student(args, kind)
        batch = collate([TinyClips(text, TRAIN_SEED, 1, args.frames)[0]])
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
        sides[kind] = (made.model.train(), made, batch, ask(batch, torch.tensor([0.5]), noise, made.settings.loss))
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {"forward": [], "backward": [], "teacher": []} for kind in sides
    }
    for number in range(args.rounds + 2):
        for kind, (_, made, batch, question) in sides.items():
            start = time.perf_counter()
            answer = made.predict(batch, question, torch.tensor([number % 3]))
            middle = time.perf_counter()
            (answer - question.target).square().mean().backward()
            end = time.perf_counter()
            made.teach(batch, question)
            parts = (middle - start, end - middle, time.perf_counter() - end)
            if number >= 2:  # the first ones compile
                for name, value in zip(seconds[kind], parts, strict=True):
                    seconds[kind][name].append(value)
    return {kind: {name: min(values) for name, values in parts.items()} for kind, parts in seconds.items()}


def tell_time(seconds: dict[str, dict[str, float]]) -> str:
    """The table of a step's seconds, as Markdown."""
    lines = ["| seconds | forward | backward | both | with the teacher |", "|---|---:|---:|---:|---:|"]
    both = {kind: parts["forward"] + parts["backward"] for kind, parts in seconds.items()}
    teacher = min(parts["teacher"] for parts in seconds.values())
    for kind in ("dense", "sparse"):
        parts = seconds[kind]
        lines.append(
            f"| {kind} LoRA | {parts['forward']:.3f} | {parts['backward']:.3f} | {both[kind]:.3f} "
            f"| {both[kind] + teacher:.3f} |"
        )
    gains = [seconds["dense"][name] / seconds["sparse"][name] for name in ("forward", "backward")]
    gains += [both["dense"] / both["sparse"], (both["dense"] + teacher) / (both["sparse"] + teacher)]
    return "\n".join([*lines, "| gain | " + " | ".join(f"{gain:.2f}x" for gain in gains) + " |"])


def show(args: argparse.Namespace, made: Student, text: Any) -> None:
    """comparison.gif: a row for each prompt; columns dense, sparse, sparse with the adapter."""
    start = 100
    prompts = [data.captions(1, start=start, regime=regime)[0] for regime in data.REGIMES]
    columns = []
    for variant in ("dense", "sparse", "sparse + LoRA"):
        if variant == "sparse + LoRA":
            put(made, args.output / "sparse")
        column = []
        for regime, prompt in enumerate(prompts):

            def transformer(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
                answers = []
                for row in range(len(hidden_states)):  # one at a time: the batch that is compiled
                    one = slice(row, row + 1)
                    batch = Batch(hidden_states[one], {"encoder_hidden_states": encoder_hidden_states[one]}, None)
                    question = Question(hidden_states[one], timestep[one], hidden_states[one])
                    if variant == "dense":  # noqa: B023
                        answers.append(made.teach(batch, question))
                    else:
                        answers.append(made.predict(batch, question, torch.tensor([regime])))  # noqa: B023
                return (torch.cat(answers),)

            video = model.sample(transformer, text, [prompt], seed=7, frames=args.frames, steps=args.sample_steps)
            column.append(video[0])
            print(f"{variant}: {prompt}", flush=True)
        columns.append(column)
    pictures.animation(columns, args.output / "comparison.gif")
    sheet = torch.stack([video for row in zip(*columns, strict=True) for video in row])
    names = [f"{name}: {prompt}" for prompt in prompts for name in ("dense", "sparse", "sparse + LoRA")]
    pictures.contact_sheet(sheet, names, args.output / "comparison.png", every=4)


def main(argv: list[str] | None = None) -> None:
    """Run the stages that are asked for."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if "train" in args.stages:
        train(args)
    if "time" in args.stages:
        seconds = time_steps(args)
        write_file(args.output / "time.json", json.dumps(seconds, indent=1).encode())
        print(f"\n{tell_time(seconds)}")
    if "measure" in args.stages:
        made, text = student(args)
        found = measure(args, made, text)
        sites = drad.report(made.compiled).replaced
        sparsity = sum(site.sparsity for site in sites) / len(sites)
        table = tell(args, found, sparsity)
        numbers = {"sparsity": sparsity, **{name: losses.tolist() for name, losses in found.items()}}
        write_file(args.output / "results.json", json.dumps(numbers).encode())
        write_file(args.output / "table.md", (table + "\n").encode())
        plot(args, found)
        print(f"\n{table}")
    if "show" in args.stages:
        show(args, *student(args))


if __name__ == "__main__":
    main()
