"""The motion router: from prompt embeddings to a regime (0 low, 1 mid, 2 high motion), in plain ATen operations.

`route` is the function that goes into graphs. `Router` holds its weights, checks shapes, saves and loads.
Weights are fitted to an encoder by `dynamicrad_compile.routing.fit.fit_router`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RouterError
from ..files import to_toml, tomllib, write_file
from ..optional import optional
from ..profiles import REGIMES

CLASSES = REGIMES
SAFE_REGIME = CLASSES.index("high")  # the least sparse: the regime that loses least when the prompt says nothing
SCHEMAS = (1, 2)
"""Of files: 2 has `reach` and `spread`, 1 has not."""
TENSORS = {"weight": 2, "bias": 1, "projection": 2, "shift": 1, "centers": 2, "reach": 1, "spread": 2}
"""Names and numbers of dimensions."""
ABOUT_REACH = ("abstained", "unreadable")
"""What is known of a router only where it has a reach."""


def motion_scores(
    embeds: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, *rest: Tensor, **named: Tensor
) -> Tensor:
    """Scores fp32 [B, 3] of prompt embeddings; NaN in rows that have no token or a value that isn't finite.

    embeds [B, T, C] or [B, C], any float dtype; mask bool or number, [B or 1, T] or with singleton dimensions between
    (nonzero = token), None = rows that aren't all zero. x = mean over tokens, divided by its length, in fp32.
    Linear: score = weight . x + bias, weight fp32 [3, C], bias fp32 [3].
    Kernel: score = weight . exp(-|projection x + shift - centers|^2) + bias,
            weight fp32 [3, M], projection [K, C], shift [K], centers [M, K].
    """
    return _judged(embeds, mask, weight, bias, *rest, **named)[0]


def _judged(
    embeds: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor | None = None,
    shift: Tensor | None = None,
    centers: Tensor | None = None,
    reach: Tensor | None = None,
    spread: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scores, and whether the prompt is within reach of what the router was fitted to; None where that is not known.

    The distance is that of z = projection x + shift from the nearest center n, and of x from the subspace that z is in:
    |z - centers_n|^2 + |spread_0 x + spread_1|^2 - |z|^2 < reach_n, with reach fp32 [M], spread [2, C].
    """
    unit = pooled(embeds, mask)
    if projection is None or centers is None:
        return torch.nn.functional.linear(unit, weight, bias), None
    z = torch.nn.functional.linear(unit, projection, shift)
    length = z.square().sum(-1)
    distance = length.unsqueeze(-1) + centers.square().sum(-1) - 2 * (z @ centers.t())
    if reach is None or spread is None:
        return torch.nn.functional.linear(torch.exp(-distance), weight, bias), None
    is_linear = weight.shape[1] == projection.shape[1]
    scores = torch.nn.functional.linear(unit if is_linear else torch.exp(-distance), weight, bias)
    whole = (unit * spread[0] + spread[1]).square().sum(-1)
    limit = reach.index_select(0, distance.argmin(-1))
    return scores, distance.amin(-1) + whole - length < limit


def pooled(embeds: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens divided by its length, fp32 [B, C]; NaN where no token or a value that isn't finite."""
    x = embeds.unsqueeze(1) if embeds.dim() == 2 else embeds
    if mask is None:
        keep = (x != 0).any(-1)
    else:
        keep = mask.reshape(mask.shape[0], mask.shape[-1]) != 0
    total = torch.where(keep.unsqueeze(-1), x, 0.0).sum(
        1, dtype=torch.float32
    )  # the mean times the count, which normalising cancels
    unit = total / total.abs().amax(-1, keepdim=True)
    return unit * unit.square().sum(-1, keepdim=True).rsqrt()


def route(embeds: Tensor, mask: Tensor | None, *head: Tensor) -> Tensor:
    """Regime int64 [B] of each prompt; arguments as for `motion_scores`, `head` is `Router.tensors`.

    A prompt without a token or with a value that isn't finite, and one out of the router's reach, give the safe regime,
    high. No host sync, static shapes.
    """
    scores, known = _judged(embeds, mask, *head)
    usable = scores.abs().sum(-1) < float("inf")
    if known is not None:
        usable = usable & known
    return torch.where(usable, scores.argmax(-1), SAFE_REGIME)


@dataclass(eq=False)
class Router:
    """A motion classifier for one text encoder.

    weight, bias, and for a kernel head projection, shift, centers: fp32, shapes in `motion_scores`; standardisation and
    the decision rule are folded into them. With reach and spread, and then projection, shift and centers for a linear
    head too, prompts unlike those of the fit are called high. What `fit_router` measured:
    accuracy         share of correct regimes, cross-validated by group, on the written prompts
    confusion        the same as counts, [true][called], in the order of `classes`
    accuracy_by      {"language": {"zh": ...}, "style": {...}}
    regularisation   strength that cross-validation chose: C of the logistic regression, or the kernel's ridge
    mid_offset       what was added to mid's score so that low and high are hardly ever confused
    masked           the encoder gave a token mask; then `route` needs it too
    abstained        share of held-out prompts, in languages that the encoder can read, that are out of reach
    unreadable       languages whose prompts are out of reach because the encoder can't read them
    """

    weight: Tensor
    bias: Tensor
    projection: Tensor | None = None
    shift: Tensor | None = None
    centers: Tensor | None = None
    reach: Tensor | None = None
    spread: Tensor | None = None
    encoder: str = "unknown"
    accuracy: float | None = None
    confusion: list[list[int]] = field(default_factory=list)
    accuracy_by: dict[str, dict[str, float]] = field(default_factory=dict)
    prompts: int = 0
    regularisation: float | None = None
    mid_offset: float = 0.0
    masked: bool = False
    date: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    abstained: float | None = None
    unreadable: list[str] = field(default_factory=list)

    classes = CLASSES

    def __post_init__(self) -> None:
        hidden = (self.projection, self.shift, self.centers)
        if any(tensor is None for tensor in hidden) != all(tensor is None for tensor in hidden):
            raise RouterError("projection, shift and centers come together or not at all.")
        if (self.reach is None) != (self.spread is None) or (self.reach is not None and self.projection is None):
            raise RouterError("reach and spread come together, with projection, shift and centers, or not at all.")
        for name, dims in TENSORS.items():
            value = getattr(self, name)
            if value is None and name not in ("weight", "bias"):
                continue
            if not isinstance(value, Tensor) or value.dim() != dims:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise RouterError(f"the router's {name} must be a tensor of {dims} dimensions, got {found}.")
            if not torch.isfinite(value).all():
                raise RouterError(f"the router's {name} has values that aren't finite. Fit it again.")
            setattr(self, name, value.detach().float().contiguous())
        shapes = {name: list(getattr(self, name).shape) for name in TENSORS if getattr(self, name) is not None}
        if shapes["weight"][0] != len(CLASSES) or shapes["bias"] != [len(CLASSES)]:
            raise RouterError(f"the router's weight must be [3, ...] and its bias [3], got {shapes}.")
        if self.projection is not None:
            (inner, channels), many = shapes["projection"], shapes["centers"][0]
            wanted = {"shift": [inner], "centers": [many, inner], "reach": [many], "spread": [2, channels]}
            wide = channels if self.head == "linear" else many
            if shapes["weight"][1] != wide or any(shapes.get(name, wanted[name]) != wanted[name] for name in wanted):
                raise RouterError(f"the router's tensors don't fit together: {shapes}.")

    @property
    def head(self) -> str:
        """linear or kernel."""
        if self.projection is None or (self.reach is not None and self.weight.shape[1] == self.projection.shape[1]):
            return "linear"
        return "kernel"

    @property
    def embedding_dim(self) -> int:
        """Channels of the embeddings it was fitted to."""
        return int((self.weight if self.projection is None else self.projection).shape[1])

    def tensors(self) -> tuple[Tensor, ...]:
        """What `route` takes after embeds and mask: the first 2, 5 or all of `TENSORS`."""
        found = (getattr(self, name) for name in TENSORS)
        return tuple(tensor for tensor in found if tensor is not None)

    def to(self, device: torch.device | str) -> Router:
        """The same router with its tensors on a device."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS if getattr(self, name) is not None}
        return replace(self, **moved)

    def predict(self, embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Regime int64 [B] (0 low, 1 mid, 2 high) of embeds [B, T, C] or [B, C], with mask [B or 1, T] or None."""
        self._check(embeds, mask)
        return route(embeds, mask, *(tensor.to(embeds.device) for tensor in self.tensors()))

    def scores(self, embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores fp32 [B, 3]; the highest is the regime."""
        self._check(embeds, mask)
        return motion_scores(embeds, mask, *(tensor.to(embeds.device) for tensor in self.tensors()))

    def knows(self, embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """bool [B]: whether a prompt is within reach; True where the router has no reach."""
        self._check(embeds, mask)
        scores, known = _judged(embeds, mask, *(tensor.to(embeds.device) for tensor in self.tensors()))
        return torch.ones_like(scores[:, 0], dtype=torch.bool) if known is None else known

    def report(self) -> str:
        """Accuracy, confusion matrix and accuracy by language and style, as text."""
        accuracy = "accuracy unknown" if self.accuracy is None else f"cross-validated accuracy {self.accuracy:.1%}"
        lines = [
            f"{self.head} router for {self.encoder}, {self.embedding_dim} channels: {accuracy}, {self.prompts} prompts"
        ]
        if self.regularisation is not None:
            lines.append(f"regularisation {self.regularisation:g}, offset of mid {self.mid_offset:+.2f}")
        if self.reach is None:
            lines.append("prompts unlike all of the fit are called by chance; fitted anew, it calls them high")
        elif self.abstained is not None:
            unread = f"; languages that the encoder can't read: {', '.join(self.unreadable)}" if self.unreadable else ""
            lines.append(f"high because unlike all of the fit: {self.abstained:.1%} of held-out prompts{unread}")
        if self.confusion:
            lines.append("true \\ called " + "".join(f"{name:>7s}" for name in CLASSES))
            for name, row in zip(CLASSES, self.confusion, strict=True):
                lines.append(f"{name:>13s} " + "".join(f"{count:7d}" for count in row))
        for kind, table in self.accuracy_by.items():
            lines.append(f"by {kind}: " + ", ".join(f"{name} {value:.1%}" for name, value in table.items()))
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write PATH.safetensors and PATH.toml beside it, each at once or not at all; returns the first."""
        weights, notes = router_files(path)
        blob = _safetensors().save(
            {name: getattr(self, name).cpu().contiguous() for name in TENSORS if getattr(self, name) is not None}
        )
        known = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in TENSORS}
        if self.reach is None:
            known = {name: value for name, value in known.items() if name not in ABOUT_REACH}
        table = {
            "schema": SCHEMAS[self.reach is not None],
            "classes": list(CLASSES),
            "embedding_dim": self.embedding_dim,
            **{name: value for name, value in known.items() if value is not None},
            "weights_sha256": hashlib.sha256(blob).hexdigest(),
        }
        write_file(weights, blob)
        write_file(notes, to_toml(table))
        return weights

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Router:
        """Read what `save` wrote. RouterError if a file is missing, altered, or of another kind."""
        weights, notes = router_files(path)
        for file in (weights, notes):
            if not file.is_file():
                raise RouterError(f"there is no router at {file}. Fit one with fit_router(pipe).save({str(path)!r}).")
        try:
            table = tomllib.loads(notes.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RouterError(f"{notes} is not valid TOML: {error}.") from None
        for key, allowed in (("schema", SCHEMAS), ("classes", (list(CLASSES),))):
            if table.get(key) not in allowed:
                wanted = " or ".join(map(repr, allowed))
                raise RouterError(f"{notes}: {key} must be {wanted}, found {table.get(key)!r}. Fit the router again.")
        blob = weights.read_bytes()
        if hashlib.sha256(blob).hexdigest() != table.get("weights_sha256"):
            raise RouterError(f"{weights} is not the file that {notes.name} describes. Fit and save the router again.")
        try:
            tensors = _safetensors().load(blob)
        except Exception as error:
            raise RouterError(f"{weights} is not a safetensors file: {error}.") from None
        if not {"weight", "bias"} <= set(tensors) <= set(TENSORS):
            raise RouterError(f"{weights} must hold {list(TENSORS)} or the first two or five, found {sorted(tensors)}.")
        known = {item.name for item in fields(cls)} - set(TENSORS)
        unknown = set(table) - known - {"schema", "classes", "embedding_dim", "weights_sha256"}
        if unknown:
            raise RouterError(f"{notes}: unknown keys {sorted(unknown)}. Known: {sorted(known)}.")
        router = cls(**tensors, **{key: value for key, value in table.items() if key in known})
        if table.get("embedding_dim") != router.embedding_dim:
            raise RouterError(
                f"{notes}: embedding_dim is {table.get('embedding_dim')!r}, the weights have {router.embedding_dim}."
            )
        return router

    def _check(self, embeds: Tensor, mask: Tensor | None) -> None:
        if embeds.dim() not in (2, 3) or embeds.shape[-1] != self.embedding_dim:
            raise RouterError(
                f"embeds must be [B, T, {self.embedding_dim}] or [B, {self.embedding_dim}], got {list(embeds.shape)}. "
                f"The router was fitted to {self.encoder}; fit one to this encoder with fit_router."
            )
        if not embeds.is_floating_point():
            raise RouterError(f"embeds must be floating point, got {embeds.dtype}.")
        if mask is None:
            return
        if embeds.dim() == 2:
            raise RouterError("a mask needs embeds [B, T, C]; these are pooled already.")
        batch, tokens = embeds.shape[:2]
        fits = mask.dim() >= 2 and mask.shape[0] in (1, batch) and mask.shape[-1] == tokens
        if not fits or any(size != 1 for size in mask.shape[1:-1]):
            raise RouterError(f"mask must be [{batch}, {tokens}], nonzero for tokens; got {list(mask.shape)}.")


def router_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The files of a saved router: weights and what is known of them."""
    file = Path(path)
    stem = file.with_suffix("") if file.suffix in (".safetensors", ".toml") else file
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".toml")


def _safetensors() -> Any:
    return optional("safetensors.torch", "saving and loading routers needs", "router", RouterError)
