"""The ways to make a model sparse that are compared: ours run compiled, those that have no place there by a hook."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..captured import report
from ..errors import DynamicRadError, nearest
from ..models.hook import Place, attention_hook
from ..options import Options
from ..plans.make import make_plan
from ..plans.plan import Candidates
from ..plans.selection import select_blocks
from .blocks import block_budget, block_mass, masked_attention, oracle_mask, random_mask, skipped
from .subject import Subject


class Run:
    """A model that is ready to be called, and what share of dense attention its calls have skipped so far."""

    def __init__(self, model: Any, sparsity: Callable[[], float]) -> None:
        self.model = model
        self.sparsity = sparsity


class Method(Protocol):
    """name: of the line in pictures; wanted: sparsity that it aims at; `describe` tells two methods apart."""

    @property
    def name(self) -> str: ...

    @property
    def wanted(self) -> float: ...

    def describe(self) -> dict[str, Any]: ...

    def run(self, subject: Subject) -> Any:
        """Context manager that yields a Run."""


@dataclass(frozen=True)
class Dense:
    """The model as it is."""

    name: str = "dense"
    wanted: float = 0.0

    def describe(self) -> dict[str, Any]:
        """What decides its clips."""
        return {"method": "dense"}

    @contextmanager
    def run(self, subject: Subject) -> Iterator[Run]:
        """The model, untouched."""
        yield Run(subject.model, lambda: 0.0)


@dataclass(frozen=True)
class Compiled:
    """`torch.compile(model, backend="dynamicrad", options=options)`: what users run. Inner compiler: eager."""

    name: str
    wanted: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What decides its clips."""
        found = {"method": "compiled", "options": {key: _plain(value) for key, value in self.options.items()}}
        profile = Path(str(self.options.get("profile", "")))
        if profile.suffix == ".toml" and profile.is_file():
            found["profile"] = hashlib.sha256(profile.read_bytes()).hexdigest()
        return found

    @contextmanager
    def run(self, subject: Subject) -> Iterator[Run]:
        """The compiled model. Raises DynamicRadError, at its first call, for wrong options."""
        torch._dynamo.reset()
        options = {"min_tokens": 0, "inner": "eager", **self.options}
        compiled = torch.compile(subject.model, backend="dynamicrad", options=options)

        def sparsity() -> float:
            found = [s for s in report(compiled).sites if s.role == "video_self_attention"]
            if not found:
                raise DynamicRadError(f"no video self-attention was found in {type(subject.model).__name__}.")
            return sum(site.sparsity for site in found) / len(found)

        yield Run(compiled, sparsity)
        torch._dynamo.reset()


Choose = Callable[[Place, Tensor, Tensor, "float | None"], "Tensor | None"]
"""(place, q, k, scale) -> bool mask [B or 1, H or 1, Mq, Mk]; None: this call stays dense."""


@dataclass(frozen=True)
class Hooked:
    """Masked attention by the research hook, with the blocks that `choose` gives. `key` says what choose does.

    With `covariance` dropped blocks are compensated for to second order; sparsity counts their means only.
    """

    name: str
    wanted: float
    choose: Choose
    block_size: int
    compensate: float = 0.0
    key: Mapping[str, Any] = field(default_factory=dict)
    covariance: bool = False

    def describe(self) -> dict[str, Any]:
        """What decides its clips."""
        return {
            "method": "hook",
            "name": self.name,
            "block": self.block_size,
            "compensate": self.compensate,
            **({"covariance": True} if self.covariance else {}),
            **self.key,
        }

    @contextmanager
    def run(self, subject: Subject) -> Iterator[Run]:
        """The model under the hook, which is open as long as this is."""
        shares: list[float] = []

        def rule(place: Place, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
            mask = self.choose(place, q, k, scale)
            shares.append(0.0 if mask is None else skipped(mask, self.block_size, self.compensate))
            if mask is None:
                return None
            return masked_attention(q, k, v, mask, self.block_size, self.compensate, scale, self.covariance)

        with attention_hook(subject.model, subject.tokens, rule):
            yield Run(subject.model, lambda: sum(shares) / max(1, len(shares)))


# Partial functions and no closures: an executor's workers are sent them.


def dense_at_first(choose: Choose, steps: int = 0, layers: int = 0) -> Choose:
    """The same choice, but dense in the first `steps` denoising steps and the first `layers` sites."""
    return partial(_dense_at_first, choose, steps, layers)


def _dense_at_first(
    choose: Choose, steps: int, layers: int, place: Place, q: Tensor, k: Tensor, scale: float | None
) -> Tensor | None:
    return None if place.step < steps or place.site < layers else choose(place, q, k, scale)


def fixed(mask: Tensor) -> Choose:
    """The same blocks everywhere."""
    return partial(_fixed, mask)


def _fixed(mask: Tensor, place: Place, q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return mask


def selected(candidates: Candidates, near: float, far: float, criterion: str = "ratio", rank: str = "mass") -> Choose:
    """The blocks that `select_blocks` keeps of candidates (P = 1): what mode dynamic_threshold runs compiled."""
    return partial(_selected, candidates, (near, far), criterion, rank)


def _selected(
    candidates: Candidates,
    thresholds: tuple[float, float],
    criterion: str,
    rank: str,
    place: Place,
    q: Tensor,
    k: Tensor,
    scale: float | None,
) -> Tensor:
    return select_blocks(q, k, candidates, thresholds, criterion, scale, rank=rank).block_mask()


def oracle(sparsity: float, block: int, compensate: float = 0.0) -> Choose:
    """The blocks with the most attention, of each head and call; see `blocks.oracle_mask`."""
    return partial(_oracle, sparsity, block, compensate)


def _oracle(
    sparsity: float, block: int, compensate: float, place: Place, q: Tensor, k: Tensor, scale: float | None
) -> Tensor:
    mass = block_mass(q, k, block, scale)
    return oracle_mask(mass, block_budget(mass.shape[-1], sparsity, block, compensate))


def random_blocks(sparsity: float, block: int, seed: int = 0) -> Choose:
    """Random blocks, others for each site and head, the same in all calls; see `blocks.random_mask`."""
    return partial(_random_blocks, sparsity, block, seed)


def _random_blocks(
    sparsity: float, block: int, seed: int, place: Place, q: Tensor, k: Tensor, scale: float | None
) -> Tensor:
    blocks = math.ceil(k.shape[-2] / block)
    shape = (1, q.shape[1], blocks, blocks)
    return random_mask(shape, block_budget(blocks, sparsity, block, 0.0), seed * 1009 + place.site)


def radial_near(subject: Subject, sparsity: float, block: int) -> tuple[Tensor, dict[str, Any]]:
    """Block mask [1, 1, M, M] and parameters of the Radial mask whose sparsity is nearest to the wanted one.

    The published mask has no budget: on small frames its frequency reduction (a limit of 128 tokens) drops nearly all
    frames. So the limit is varied too, 128 first, as well as the width; the sink frame stays.
    """
    best: tuple[float, Tensor, dict[str, Any]] | None = None
    for limit in sorted({128, *(block * 2**i for i in range(4) if block * 2**i < 128)}, reverse=True):
        for decay in np.geomspace(0.05, 8.0, 16):
            params = {"decay_factor": round(float(decay), 4), "thinning_tokens": limit}
            plan = make_plan("radial", subject.grid, block, *subject.text, **params)
            if best is None or abs(plan.sparsity - sparsity) < best[0] - 1e-9:
                best = abs(plan.sparsity - sparsity), plan.block_mask(), params
    assert best is not None
    return best[1], best[2]


METHODS = ("dense", "radial", "static_ratio", "dynamic_threshold", "random", "oracle")


def check_method(name: str) -> None:
    """Raises DynamicRadError if there is no method of this name."""
    if name not in METHODS:
        raise DynamicRadError(f"methods are {', '.join(METHODS)}; got {name!r}.{nearest(name, METHODS)}")


def method(
    name: str,
    subject: Subject,
    sparsity: float,
    block_size: int,
    profile: str = "default",
    compensate: float | None = None,
    **options: Any,
) -> Method:
    """A method by its name, at a sparsity; `options` go to the backend (ours). Raises DynamicRadError for another name
    or a wrong option.

    compensate is for ours; None = the profile's. Radial Attention has no budget and gets its nearest mask.
    """
    check_method(name)
    if name == "dense":
        return Dense()
    if name in ("static_ratio", "dynamic_threshold"):
        chosen = {"profile": profile, "mode": name, "sparsity": sparsity, "block_size": block_size, **options}
        chosen |= {} if compensate is None else {"compensate": compensate}
        Options.from_mapping(chosen)  # before any clip is made
        return Compiled(name, sparsity, chosen)
    if name == "radial":
        mask, params = radial_near(subject, sparsity, block_size)
        return Hooked(name, sparsity, fixed(mask), block_size, key=params)
    if name == "random":
        return Hooked(name, sparsity, random_blocks(sparsity, block_size), block_size, key={"sparsity": sparsity})
    return Hooked(name, sparsity, oracle(sparsity, block_size), block_size, key={"sparsity": sparsity})


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
