"""Train the tiny video model by flow matching.

    python -m examples.tiny_video.train --output runs/tiny --minutes 80      # start, or go on where it stopped
    python -m examples.tiny_video.train --output runs/tiny --minutes 120     # the same run with a longer schedule
    python -m examples.tiny_video.train --output runs/tiny --steps 4000      # the schedule by steps, whatever the clock
    python -m examples.tiny_video.train --output runs/64 --size 64 --start CHECKPOINT --batch-size 2   # more tokens

    x_s = (1 - s) x + s e,    loss = mean |v(x_s, 1000 s, caption) - (e - x)|^2        e normal, s shifted uniform

(rectified flow, Liu et al. 2022; the shift of SD3, Esser et al. 2024). Hidden matrices are trained by Muon, the rest by
AdamW. The learning rate rises for a hundred steps, stays, and falls to zero over the last `--decay` of the run. In the
first `--short-share` of it steps take turns: many clips of a quarter of the frames, fewer of half, few of all. The
short ones show more captions and shapes for less attention.
Clips, noise and noise levels of a step depend only on seed and step. With `--steps` the schedule does too, and a run
that was stopped and goes on is the run that was not stopped; with `--minutes` it follows the clock.

Writes to --output: ema_latest.safetensors (what `model.load` takes) with config.json, training.safetensors (to go on),
log.jsonl, loss.png, samples_STEP.png and samples.gif. Ctrl-C or SIGTERM ends it after the step, saved.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dynamicrad_compile.beforehand import output_folder
from dynamicrad_compile.errors import DynamicRadError
from dynamicrad_compile.files import write_file
from dynamicrad_compile.quality.tiny_video import data, model

from . import pictures
from .muon import Muon

SEED = 1
HELD_OUT = 24  # clips of the held-out loss
LOG_STEPS = 20
STRIDE = 1024  # between the first clips of two steps
TURNS = (4, 2, 1, 1)  # parts of the frames, and times the clips, of steps in turn


def learning_rate(done: float, step: int, decay: float, warmup: int = 100) -> float:
    """Factor on the learning rate, 0 to 1, when this share of the run is done."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(1 - done, 0.0) / decay)


def example(step: int, batch_size: int, frames: int, drop: float, size: int = data.SIZE) -> tuple[torch.Tensor, ...]:
    """(noisy videos, noise levels in 0..1, velocities, captions) of a step."""
    videos, captions = data.batch(SEED, range(step * STRIDE, step * STRIDE + batch_size), frames, size)
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    captions = ["" if torch.rand((), generator=generator) < drop else caption for caption in captions]
    uniform = (torch.rand((), generator=generator) + torch.arange(batch_size) / batch_size) % 1  # stratified
    return (*_noisy(videos, uniform, generator), captions)


def _noisy(videos: torch.Tensor, uniform: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    level = model.SHIFT * uniform / (1 + (model.SHIFT - 1) * uniform)
    noise = torch.randn(videos.shape, generator=generator)
    share = level[:, None, None, None, None]
    return (1 - share) * videos + share * noise, level, noise - videos


def velocity_loss(transformer: Any, text: Any, noisy: Any, level: Any, velocity: Any, captions: Any) -> torch.Tensor:
    """Mean squared error of the velocity of each video [batch]."""
    out = transformer(noisy, timestep=level * 1000, encoder_hidden_states=text.encode(captions), return_dict=False)[0]
    return (out - velocity).square().flatten(1).mean(1)


@torch.no_grad()
def held_out_loss(
    transformer: Any, text: Any, frames: int = data.FRAMES, clips: int = HELD_OUT, size: int = data.SIZE
) -> torch.Tensor:
    """Loss [clips] on clips, noise and levels that are always the same."""
    generator = torch.Generator().manual_seed(data.HELD_OUT_SEED)
    videos, captions = data.batch(data.HELD_OUT_SEED, range(clips), frames, size)
    noisy, level, velocity = _noisy(videos, (torch.arange(clips) + 0.5) / clips, generator)
    parts = [slice(i, i + 8) for i in range(0, clips, 8)]
    return torch.cat([velocity_loss(transformer, text, noisy[p], level[p], velocity[p], captions[p]) for p in parts])


class Run:
    """Everything of a training run that goes into its checkpoint."""

    def __init__(self, folder: Path, lr: float, size: int = data.SIZE, start: Path | None = None) -> None:
        torch.manual_seed(SEED)
        self.folder, self.size = folder, size
        self.transformer, self.text = model.create()
        if start is not None:
            for module, trained in zip((self.transformer, self.text), model.load(start), strict=True):
                module.load_state_dict(trained.state_dict())
        named = model.parameters(self.transformer, self.text)
        matrices = [p for name, p in named.items() if ".blocks." in name and p.ndim == 2 and min(p.shape) > 1]
        ids = {id(p) for p in matrices}
        rest = [p for p in named.values() if id(p) not in ids]
        self.optimizers = [
            Muon(matrices, lr=lr),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.lr, self.step, self.clips, self.seconds = lr, 0, 0, 0.0
        self.ema = {name: value.detach().clone() for name, value in model.state(self.transformer, self.text).items()}
        self.parameters = list(named.values())

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "transformer": model.TRANSFORMER,
            "vocabulary": data.vocabulary(),
            "size": self.size,
            "step": self.step,
            "clips": self.clips,
            "hours": round(self.seconds / 3600, 3),
        }

    def save(self) -> None:
        """Write both checkpoints, each in one piece."""
        tensors = {f"model.{key}": value for key, value in model.state(self.transformer, self.text).items()}
        tensors |= {f"ema.{key}": value for key, value in self.ema.items()}
        for i, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{index}.{name}": torch.as_tensor(x) for name, x in values.items()}
        partial = self.folder / "training.partial"
        numbers = {"step": str(self.step), "clips": str(self.clips), "seconds": str(self.seconds)}
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, partial, numbers)
        partial.replace(self.folder / "training.safetensors")
        model.save(self.folder / "ema_latest.safetensors", self.ema, self.config())

    def resume(self) -> None:
        """Take up the checkpoint of the folder; the log is cut back to its step. ValueError if it is another file."""
        path = self.folder / "training.safetensors"
        with safe_open(path, "pt") as file:
            numbers = file.metadata() or {}
        if not {"step", "clips", "seconds"} <= set(numbers):
            raise ValueError(f"{path} says nothing of steps and clips; it was not written by tiny_video.train.")
        tensors = load_file(path)
        self.step, self.clips, self.seconds = int(numbers["step"]), int(numbers["clips"]), float(numbers["seconds"])
        log = self.folder / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        write_file(log, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= self.step))
        for part, module in (("transformer", self.transformer), ("text", self.text)):
            prefix = f"model.{part}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        self.ema = {key[4:]: value for key, value in tensors.items() if key.startswith("ema.")}
        for i, optimizer in enumerate(self.optimizers):
            whole = optimizer.state_dict()
            whole["state"] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{i}."):
                    index, name = key.split(".")[2:]
                    whole["state"].setdefault(int(index), {})[name] = value
            optimizer.load_state_dict(whole)

    def train_step(self, batch: tuple[Any, ...], factor: float, compiled: Any) -> float:
        """One step of both optimizers and the average of the weights; the loss before it."""
        loss = velocity_loss(compiled, self.text, *batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.clips += len(batch[0])
        decay = min(0.998, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            for name, value in model.state(self.transformer, self.text).items():
                self.ema[name].lerp_(value, 1 - decay)
        return loss.item()

    def averaged(self) -> tuple[Any, Any]:
        """Transformer and text encoder with the averaged weights."""
        transformer, text = model.create()
        for part, module in (("transformer", transformer), ("text", text)):
            prefix = f"{part}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in self.ema.items() if k.startswith(prefix)})
            module.eval().requires_grad_(False)
        return transformer, text


def show(run: Run, transformer: Any, text: Any) -> None:
    """Samples of one caption of each regime and of a fourth, and the loss curve."""
    captions = [data.captions(1, regime=regime)[0] for regime in data.REGIMES] + data.captions(1, start=50)
    videos = model.sample(transformer, text, captions, seed=0, steps=16, size=(run.size, run.size))
    pictures.contact_sheet(videos, captions, run.folder / f"samples_{run.step:06d}.png")
    pictures.animation([[video] for video in videos], run.folder / "samples.gif")
    rows = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    pictures.loss_curve(rows, run.folder / "loss.png")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; one with a checkpoint goes on")
    parser.add_argument("--minutes", type=float, default=80, help="training time in all, earlier parts included (80)")
    parser.add_argument("--steps", type=int, help="so many steps in all instead, whatever the clock says")
    parser.add_argument("--batch-size", type=int, default=6, help="clips of all frames in a step (6)")
    parser.add_argument("--frames", type=int, default=data.FRAMES)
    parser.add_argument("--size", type=int, default=data.SIZE, help=f"pixels, both sides ({data.SIZE})")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights a new run begins with (random ones)")
    parser.add_argument("--short-share", type=float, default=0.5, help="share of the run with shorter clips too (0.5)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the run in which the rate falls (0.4)")
    parser.add_argument("--drop", type=float, default=0.1, help="share of captions left out, for guidance (0.1)")
    parser.add_argument("--stop-after", type=int, help="end after this many steps of the run; a later call goes on")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--show-minutes", type=float, default=12)
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--compile", action="store_true", help="compile the training step with Inductor")
    args = parser.parse_args(argv)
    for name in ("minutes", "steps", "batch_size", "lr", "decay", "threads"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.frames < max(TURNS):
        parser.error(f"--frames must be at least {max(TURNS)}, got {args.frames}")
    if args.size < 4 or args.size % 4:
        parser.error(f"--size must be a multiple of 4, the patch, got {args.size}")
    try:
        output_folder(args.output)
    except DynamicRadError as error:
        parser.error(str(error))
    return args


def train(run: Run, args: argparse.Namespace, stop: list[int]) -> None:
    """Steps until the schedule has ended, or something is in `stop`; saves and shows now and then."""
    compiled = torch.compile(run.transformer) if args.compile else run.transformer
    saved = shown = offset = run.seconds
    begin = time.perf_counter()
    losses: list[float] = []

    def share() -> float:
        return run.step / args.steps if args.steps else run.seconds / (args.minutes * 60)

    def percent() -> float:
        return min(100.0, round(100 * share(), 1))

    layout = "{desc} {percentage:5.1f} %|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=100, initial=percent(), bar_format=layout) as bar, (run.folder / "log.jsonl").open("a") as log:

        def note(**row: Any) -> None:
            log.write(json.dumps({"step": run.step, **row}) + "\n")
            log.flush()

        while (done := share()) < 1 and not stop and run.step != args.stop_after:
            part = TURNS[run.step % len(TURNS)] if done < args.short_share else 1
            batch = example(run.step, args.batch_size * part, args.frames // part, args.drop, args.size)
            losses.append(run.train_step(batch, learning_rate(done, run.step, args.decay), compiled))
            run.seconds = offset + time.perf_counter() - begin
            if run.step % LOG_STEPS == 0:
                loss = sum(losses) / len(losses)
                note(seconds=round(run.seconds), loss=loss)
                bar.set_description(f"step {run.step}, loss {loss:.4f}")
                bar.update(percent() - bar.n)
                losses = []
            if run.seconds - saved > args.save_minutes * 60:
                saved = run.seconds
                run.save()
                averaged = run.averaged()
                held_out = held_out_loss(*averaged, size=run.size).mean().item()
                note(held_out=held_out)
                bar.write(f"step {run.step}: held-out loss {held_out:.4f}")
                if run.seconds - shown > args.show_minutes * 60:
                    shown = run.seconds
                    show(run, *averaged)
        run.save()
        note(held_out=held_out_loss(*run.averaged(), size=run.size).mean().item())


def main(argv: list[str] | None = None) -> Run:
    """Train; returns the run as it ended."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.output, args.lr, args.size, args.start)
    if (args.output / "training.safetensors").is_file():
        run.resume()
    stop: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)  # a step is never cut in two
    before = [signal.signal(number, lambda number, frame: stop.append(number)) for number in signals]
    try:
        train(run, args, stop)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    show(run, *run.averaged())
    return run


if __name__ == "__main__":
    main()
