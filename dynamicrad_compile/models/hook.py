"""A research hook: hand every video self-attention of a model that runs to a function of ours.

The backend's own methods need no hook, they run compiled. This is for what has no place in a compiled model: the
oracle, random blocks, capturing queries and keys, one layer or step at a time.

    with attention_hook(model, tokens=1024, rule=rule):
        video = sample(model, prompt)

It is PyTorch's torch-function mode, so it sees `scaled_dot_product_attention` however the model came to it, and leaves
every other call (text, cross-attention, other lengths, other models) as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import DynamicRadError


@dataclass(frozen=True)
class Place:
    """Where an attention is: number of the site in the model, of the denoising step, and of the call in that step.

    With guidance as two calls a step, call 0 is the first of them.
    """

    site: int
    step: int
    call: int


Rule = Callable[[Place, Tensor, Tensor, Tensor, "float | None"], "Tensor | None"]
"""(place, q, k, v [B, H, S, D], scale) -> output [B, H, S, D], or None for dense attention."""


class _Hook(TorchFunctionMode):
    def __init__(self, tokens: int, rule: Rule) -> None:
        super().__init__()
        self.tokens, self.rule = tokens, rule
        self.site, self.step, self.call = 0, -1, 0
        self.timestep: float | None = None
        self.inside = False
        self.seen = 0

    def begin(self, timestep: Tensor | None) -> None:
        """Note a call of the model: a timestep that differs from the last one is a new step, a rise a new run."""
        now = None if timestep is None else float(timestep.detach().float().max())
        if now is None or self.timestep is None or now > self.timestep:
            self.step, self.call = (self.step + 1 if now is None else 0), 0
        elif now < self.timestep:
            self.step, self.call = self.step + 1, 0
        else:
            self.call += 1
        self.timestep, self.site, self.inside = now, 0, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.inside:
            return func(*args, **kwargs)
        q, k, v = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        if not (q.dim() == 4 and q.shape[-2] == k.shape[-2] == self.tokens):
            return func(*args, **kwargs)
        if len(args) > 3 or kwargs.get("attn_mask") is not None or kwargs.get("is_causal") or kwargs.get("dropout_p"):
            raise DynamicRadError(
                f"the hook knows only plain attention, but site {self.site} has a mask, dropout or causality."
            )
        place = Place(self.site, self.step, self.call)
        self.site += 1
        self.seen += 1
        with _Disabled(self):
            out = self.rule(place, q, k, v, kwargs.get("scale"))
        return func(*args, **kwargs) if out is None else out


class _Disabled:
    """The hook does not see the attention that a rule computes."""

    def __init__(self, hook: _Hook) -> None:
        self.hook = hook

    def __enter__(self) -> None:
        self.hook.inside = False

    def __exit__(self, *_: object) -> None:
        self.hook.inside = True


@contextmanager
def attention_hook(model: torch.nn.Module, tokens: int, rule: Rule) -> Iterator[None]:
    """While it is open, attentions of `tokens` queries and keys inside `model` go to `rule`.

    Steps are told by the model's timestep, which must fall within a run (a rise begins a new one). Raises
    DynamicRadError for an attention with a mask, dropout or causality, and at the end if no attention was met at all.
    """
    hook = _Hook(tokens, rule)
    signature = inspect.signature(model.forward)

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        hook.begin(next((given[name] for name in ("timestep", "timesteps", "t") if name in given), None))

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        hook.inside = False

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        with hook:
            yield
    finally:
        for handle in handles:
            handle.remove()
    if not hook.seen:
        raise DynamicRadError(f"no attention of {tokens} queries and keys was met: is the token grid right?")
