"""The model that learns, and its teacher: one set of weights, once with the adapter and sparse, once without and dense.

The regime of each clip is pinned on the device before a call (`runtime.state.PinnedState`), so it changes without
compiling.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import compiling
from ..captured import report
from ..errors import LoraError
from ..noting import MASK, PROMPT
from ..profiles import REGIMES
from ..runtime.beside import PinnedState
from ..runtime.router import Router
from .data import Batch
from .losses import Question
from .settings import Settings

ADAPTER = "default"


class Student:
    """A diffusers transformer with a new LoRA adapter, compiled for training; see `Settings` for the parts."""

    def __init__(self, model: Any, settings: Settings, device: torch.device) -> None:
        self.model, self.settings = model, settings
        self._add_adapter()
        model.to(device)
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for weight in self.weights.values():
            weight.data = weight.data.float()
        if settings.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.state = PinnedState(device)
        options = dict(settings.sparse)
        if not settings.dense:
            options = {"dense_steps": 0, **options}
        router = options.get("router")
        self.router = Router.load(router) if isinstance(router, str) else router
        self.call: Any = compiling.compile(model, state=None if settings.dense else self.state, **options)
        inner = options.get("inner", "inductor")
        self.teacher_call: Any = model if inner == "eager" else torch.compile(model, backend=inner)
        self.compiled = self.call

    def _add_adapter(self) -> None:
        from peft import LoraConfig

        adapter = self.settings.adapter
        if not hasattr(self.model, "add_adapter"):
            raise LoraError(
                f"{type(self.model).__name__} can't hold an adapter; a transformer of diffusers is expected."
            )
        if ADAPTER in getattr(self.model, "peft_config", {}):
            raise LoraError("the model has an adapter already; fuse it, or load the model anew.")
        self.model.requires_grad_(False)
        config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets))
        torch.manual_seed(self.settings.train.seed)  # the same start in every process
        try:
            self.model.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise LoraError(f"adapter.targets = {adapter.targets}: {error}") from None

    @property
    def dtype(self) -> torch.dtype:
        """That of most frozen weights; diffusers keeps some in float32."""
        sizes: Counter[torch.dtype] = Counter()
        for weight in self.model.parameters():
            if not weight.requires_grad:
                sizes[weight.dtype] += weight.numel()
        return sizes.most_common(1)[0][0]

    @property
    def dense_level(self) -> float | None:
        """The noise level from which on inference is dense (dense_timestep); None: it is sparse at all."""
        timestep = self.settings.sparse.get("dense_timestep")
        if timestep is None or self.settings.dense:
            return None
        loss = self.settings.loss
        return 1.0 - timestep / loss.timestep_scale if loss.timestep_rises else timestep / loss.timestep_scale

    def regimes(self, batch: Batch, generator: torch.Generator, jitter: bool = True) -> Tensor:
        """The regime of each clip of a batch, int64 [B], by [regimes]; `jitter` False leaves out its jitter."""
        source, count = self.settings.regimes.source, len(batch.latents)
        anything = torch.randint(len(REGIMES), (count,), generator=generator, device="cpu")
        jittered = (
            torch.rand(count, generator=generator, dtype=torch.float32, device="cpu") < self.settings.regimes.jitter
        ) & jitter
        if source == "random":
            return anything
        if source == "label":
            if batch.regime is None:
                raise LoraError("regimes.source = 'label', and a clip has no regime. Label it, or use 'router'.")
            found = batch.regime.cpu()
        elif source == "router":
            assert self.router is not None
            prompt = next((batch.conditions[n] for n in PROMPT if n in batch.conditions), None)
            mask = next((batch.conditions[n] for n in MASK if n in batch.conditions), None)
            if prompt is None:
                raise LoraError(f"regimes.source = 'router', and no condition is called one of {PROMPT}.")
            found = self.router.predict(prompt, mask if self.router.masked else None).cpu()
        else:
            found = torch.full((count,), REGIMES.index(source), dtype=torch.int64, device="cpu")
        return torch.where(jittered, anything, found)

    def predict(self, batch: Batch, question: Question, regimes: Tensor) -> Tensor:
        """The student's answer, like the latents, in the given regimes."""
        self.state.pin(regimes, question.timestep, self.settings.loss.timestep_rises)
        return self._answer(self.call, batch, question)

    def teach(self, batch: Batch, question: Question) -> Tensor:
        """The dense teacher's answer, without gradients."""
        with torch.no_grad(), without_adapter(self.model):
            return self._answer(self.teacher_call, batch, question)

    def _answer(self, call: Callable[..., Any], batch: Batch, question: Question) -> Tensor:
        out = call(question.noisy, timestep=question.timestep, **batch.conditions, return_dict=False)
        answer: Tensor = out[0]
        return answer

    def check_replaced(self) -> None:
        """Raises LoraError if the backend replaced nothing, though it was asked to."""
        done = report(self.compiled)
        if not done.replaced and not self.settings.dense:
            raise LoraError(f"no attention became sparse, so there is no mask to train with.\n{done}")


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Inside, the model is as it was before it had an adapter."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
