"""LoRA that knows the mask: the model is trained through the block-sparse attention that it will run with."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..captured import report
from ..errors import LoraError
from ..optional import optional
from ..reporting.report import Report
from .checkpoint import CURVE_FILE, JOURNAL_FILE, STATE_FILE, Journal, read_state, write_adapter, write_state
from .checks import check_place, check_training
from .data import Batch, Clips, batches
from .losses import Question, ask, draw_levels, held_out_losses, mean_and_error
from .pictures import plot_losses
from .settings import Settings
from .student import ADAPTER, Student


@dataclass(frozen=True)
class Result:
    """What a training gives.

    model          the model with its adapter
    student        the same, compiled with the options of [sparse]; its regime is that of the last call
    report         what the backend did
    steps          finished
    lines          of the journal
    step_seconds   median of a step's seconds, those with compilation or measurement left out; None if there is no other
    """

    model: Any
    student: Any
    report: Report
    steps: int
    lines: list[dict[str, Any]]
    step_seconds: float | None


def finetune(
    model: Any,
    clips: Clips,
    settings: Settings,
    held_out: Clips | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Train a LoRA on a diffusers transformer and write it to `settings.output`.

    model     with its weights, in the dtype that it is to have; it gets an adapter and stays trained
    clips     what to train on, see `Clip`
    held_out  on which the loss is measured, dense and without adapter at first, then sparse
    resume    go on from the state in `settings.output`

    Under `accelerate launch` every process takes its share of the clips. Ctrl-C saves and stops. Writes adapter/,
    losses.jsonl, losses.png and resume.safetensors. Raises LoraError, OptionsError or ProfileError.
    """
    check_place(settings, resume)
    check_training(model, clips, settings)
    accelerate, tqdm = (optional(name, "training needs", "lora", LoraError) for name in ("accelerate", "tqdm"))
    output = Path(settings.output)
    accelerator = accelerate.Accelerator(mixed_precision=settings.train.mixed_precision)
    training = _Training(model, settings, accelerator)
    first = training.resume(output / STATE_FILE) if resume else 0
    if accelerator.is_main_process:
        training.journal = Journal(output / JOURNAL_FILE, first if resume else None)
    total = settings.train.steps
    bar = tqdm.tqdm(
        total=total,
        initial=first,
        disable=not (progress and accelerator.is_main_process),
        unit="step",
        dynamic_ncols=True,
        file=sys.stderr,
    )
    with bar:
        try:
            training.run(clips, held_out, first, bar)
        finally:  # what was learnt before an error or Ctrl-C is kept
            if training.finished > first:
                training.save(training.finished)
    step = training.finished
    return Result(
        model,
        training.student.compiled,
        report(training.student.compiled),
        step,
        training.journal.lines if training.journal else [],
        training.median_seconds(),
    )


class _Training:
    """The loop of `finetune`."""

    def __init__(self, model: Any, settings: Settings, accelerator: Any) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.student = student = Student(model, settings, accelerator.device)
        self.dtype = student.dtype
        train = settings.train
        optimizer = torch.optim.AdamW(student.weights.values(), lr=0.0, weight_decay=train.weight_decay)
        student.call, self.optimizer = accelerator.prepare(student.call, optimizer)
        self.journal: Journal | None = None
        self.finished = 0
        self.seconds: list[float] = []

    def resume(self, file: Path) -> int:
        self.finished = read_state(file, self._identity(), self.student.weights, self._plain_optimizer())
        return self.finished

    def run(self, clips: Clips, held_out: Clips | None, first: int, bar: Any) -> None:
        train, accelerator = self.settings.train, self.accelerator
        share = (accelerator.process_index, accelerator.num_processes)
        workers = self.settings.data.workers if self.settings.data else 0
        calls = (first * train.accumulate, train.steps * train.accumulate)
        loader = iter(batches(clips, train.batch_size, *calls, share, train.seed, workers))
        if held_out is not None and first == 0:
            self._measure(held_out, 0, "teacher")
            self._measure(held_out, 0)
        for step in range(first, train.steps):
            start = time.perf_counter()
            losses = self._step(loader, step)
            self.seconds.append(time.perf_counter() - start)
            self.finished = step + 1
            if step == first:
                self.student.check_replaced()
            if self.journal is not None:
                self.journal.add(step=step + 1, **losses, seconds=round(self.seconds[-1], 4))
            bar.set_postfix_str(
                " ".join(f"{name} {value:.4f}" for name, value in losses.items() if value), refresh=False
            )
            bar.update()
            last = step + 1 == train.steps
            if held_out is not None and (last or (train.eval_every and (step + 1) % train.eval_every == 0)):
                self._measure(held_out, step + 1)
            if not last and train.save_every and (step + 1) % train.save_every == 0:
                self.save(step + 1)

    def _step(self, loader: Iterator[Batch], step: int) -> dict[str, float]:
        train, accelerator, student = self.settings.train, self.accelerator, self.student
        student.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        sums = torch.zeros(2, device=accelerator.device, dtype=torch.float32)
        for part in range(train.accumulate):
            batch = next(loader).to(accelerator.device, self.dtype)
            call = (step * train.accumulate + part) * accelerator.num_processes + accelerator.process_index
            generator = torch.Generator().manual_seed(train.seed * 1_000_003 + call)
            waits = part + 1 < train.accumulate
            with accelerator.no_sync(student.call) if waits else contextlib.nullcontext():
                loss, parts = self._loss(batch, generator)
                accelerator.backward(loss / train.accumulate)
            sums += parts / train.accumulate
        flow, distill = accelerator.reduce(sums, "mean").tolist()
        weights = self.settings.loss
        if not math.isfinite(flow + distill):
            raise LoraError(f"the loss is not finite at step {step + 1}: lower train.learning_rate.")
        accelerator.clip_grad_norm_(list(student.weights.values()), train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "loss": weights.flow * flow + weights.distill * distill,
            "flow": flow,
            **({"distill": distill} if weights.distill else {}),
        }

    def _loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The loss of a call, and its parts [flow, distill] without their weights."""
        weights, student = self.settings.loss, self.student
        regimes = student.regimes(batch, generator)
        levels = draw_levels(len(batch.latents), weights, generator, student.dense_level)
        question = ask(
            batch,
            levels,
            torch.randn(batch.latents.shape, generator=generator, dtype=torch.float32, device="cpu"),
            weights,
        )
        taught = None
        if weights.distill:
            with self.accelerator.autocast():
                taught = student.teach(batch, question).float()
        answer = student.predict(batch, question, regimes).float()
        flow = (answer - question.target).square().mean()
        distill = (answer - taught).square().mean() if taught is not None else torch.zeros_like(flow)
        return weights.flow * flow + weights.distill * distill, torch.stack([flow, distill]).detach()

    def _measure(self, clips: Clips, step: int, who: str = "student") -> None:
        """Held-out loss into the journal; every process measures the same, the main one writes."""
        student, generator = self.student, torch.Generator().manual_seed(self.settings.train.seed)
        student.model.eval()

        def call(batch: Batch, question: Question) -> Tensor:
            if who == "teacher":
                return student.teach(batch, question)
            return student.predict(batch, question, student.regimes(batch, generator, jitter=False))

        count = min(self.settings.train.eval_clips, len(clips))
        prepare = lambda batch: batch.to(self.accelerator.device, self.dtype)  # noqa: E731
        losses = held_out_losses(call, clips, self.settings.loss, count, prepare=prepare)
        if self.journal is not None:
            key = "held_out" if who == "student" else "held_out_dense"
            self.journal.add(step=step, **{key: [round(x, 6) for x in mean_and_error(losses)]})

    def _learning_rate(self, step: int) -> float:
        train = self.settings.train
        if step < train.warmup:
            return train.learning_rate * (step + 1) / (train.warmup + 1)
        done = (step - train.warmup) / max(1, train.steps - train.warmup)
        return train.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))

    def save(self, step: int) -> None:
        """Write adapter, state and curve; the main process does."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        output, student = Path(self.settings.output), self.student
        write_adapter(student.model, output / "adapter", ADAPTER)
        write_state(output / STATE_FILE, step, self._identity(), student.weights, self._plain_optimizer())
        if self.journal is not None:
            kind = "dense" if self.settings.dense else "mask-aware"
            plot_losses(self.journal.lines, output / CURVE_FILE, f"{kind} LoRA, rank {self.settings.adapter.rank}")

    def median_seconds(self) -> float | None:
        """Median of a step's seconds without the first two, which compile."""
        rest = sorted(self.seconds[2:])
        return rest[len(rest) // 2] if rest else None

    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _identity(self) -> str:
        """What a resumed training must share; more steps are allowed, the learning rate then falls later."""
        values = self.settings.model_dump(mode="json", include={"adapter", "regimes", "loss", "train"})
        for name in ("steps", "save_every", "eval_every", "eval_clips"):
            values["train"].pop(name)
        sparse = {
            name: str(value) for name, value in self.settings.sparse.items() if name not in ("inner", "inner_options")
        }
        return json.dumps({**values, "sparse": sparse, "processes": self.accelerator.num_processes}, sort_keys=True)
