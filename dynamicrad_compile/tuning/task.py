"""What a search is about: everything that decides its result, and nothing else."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ..errors import OptionsError, nearest
from ..kernels.blocks import cdiv
from ..problems import problems
from ..profiles.parameters import BLOCK_SIZES, MODES, REGIMES, DynamicThreshold, StaticRatio
from .boxes import Shape, problem, shapes
from .captures import Capture
from .proxy import PROXIES

# Seeds of the draws that no search sees; as many as the search has, at most.
HELD_OUT_SEEDS = (1001, 1002, 1003)
# Chosen by benchmarks/tuner_comparison.py; see docs/tuning.md.
DEFAULT_OPTIMIZER = "NGOpt"
# Points that the end of each search keeps for the winners of the others, and the smallest budget that makes sense.
EXCHANGED = 3
MIN_BUDGET = 10
# Floats of the tables of one draw, of all orders of tokens, where the number of rows is not given.
TABLE_FLOATS = 40_000_000
# Channels of values that errors are measured in, at most.
CHANNELS = 32
# What dynamic_threshold has beyond static_ratio and can be fixed.
CHOICES = ("criterion", "rank")


@dataclass(frozen=True)
class Task:
    """A search for the parameters of all regimes. Two equal tasks give equal results.

    grid                     (frames, height, width) in latent tokens
    block_size               tokens of a block
    text_before, text_after  text tokens around the video
    heads, head_dim          of the video proxy; the published one has two heads at most, since its heads are alike
    proxies                  "published", "video", "captured"; the loss is the mean over the draws of all of them
    modes                    static_ratio alone, or with dynamic_threshold
    sparsity                 share of dense attention that must be skipped, compensation counted
    seeds                    of the draws of each proxy
    rows                     sampled query rows a head; None = all of a short sequence, else what fits TABLE_FLOATS,
                             at least 64
    budget                   evaluations for each regime and mode
    optimizer, seed          name in Nevergrad's registry, seed of its random numbers
    batch                    points asked for at once; as many can be evaluated in parallel
    fixed                    parameters that are not searched, such as {"compensate": 0.0, "box": [4, 4, 8]}: the
                             planner's, criterion and rank
    boxes                    shapes of blocks that are searched, [frames, height, width] or "raster"; none = all of
                             `boxes.shapes`, or the one that is fixed
    captures                 attention of a model for the proxy "captured", see `captures.record_attention`

    Raises OptionsError for a value out of its range.
    """

    grid: tuple[int, int, int]
    block_size: int = 128
    text_before: int = 0
    text_after: int = 0
    heads: int = 4
    head_dim: int = 128
    proxies: tuple[str, ...] = ("published", "video")
    modes: tuple[str, ...] = MODES
    sparsity: float = 0.8
    seeds: tuple[int, ...] = (1, 2, 3)
    rows: int | None = None
    budget: int = 30
    optimizer: str = DEFAULT_OPTIMIZER
    seed: int = 0
    batch: int = 1
    fixed: dict[str, Any] = field(default_factory=dict)
    captures: tuple[Capture, ...] = ()
    boxes: tuple[Shape, ...] = ()

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise OptionsError(f"block_size must be one of {list(BLOCK_SIZES)}, got {self.block_size!r}.")
        for name, least in (("heads", 1), ("head_dim", 4), ("budget", MIN_BUDGET), ("batch", 1)):
            self._check_integer(name, getattr(self, name), least)
        for name in ("text_before", "text_after", "seed"):
            self._check_integer(name, getattr(self, name), 0)
        if self.rows is not None:
            self._check_integer("rows", self.rows, 1)
        if not (isinstance(self.grid, tuple) and len(self.grid) == 3):
            raise OptionsError(f"grid must be (frames, height, width) in latent tokens, got {self.grid!r}.")
        for size in self.grid:
            self._check_integer("each size of the grid", size, 1)
        number = isinstance(self.sparsity, numbers.Real) and not isinstance(self.sparsity, bool)
        if not number or not 0.0 < self.sparsity < 1.0:
            raise OptionsError(f"sparsity must lie between 0 and 1, got {self.sparsity!r}.")
        self._check_names("proxies", self.proxies, (*PROXIES, "captured"))
        self._check_captures()
        self._check_names("modes", self.modes, MODES)
        if MODES[0] not in self.modes:
            raise OptionsError("modes must hold 'static_ratio': every profile has that table.")
        if not self.seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in self.seeds):
            raise OptionsError(f"seeds must be at least one integer, got {self.seeds!r}.")
        self._check_fixed()
        self._set_boxes()

    def _check_fixed(self) -> None:
        known = [*(name for name in StaticRatio.model_fields if name != "sparsity"), *CHOICES]
        for name in self.fixed:
            if name not in known:
                raise OptionsError(f"fixed: unknown parameter {name!r}; known are {known}.{nearest(name, known)}")
        try:
            table = {"criterion": "ratio", **self.fixed, "sparsity": self.sparsity, "near": 1.0, "far": 1.0}
            DynamicThreshold.model_validate(table)
        except ValidationError as error:
            raise OptionsError(f"fixed: {'; '.join(problems(error, DynamicThreshold))}") from None

    def _set_boxes(self) -> None:
        """Check and set `boxes`, as lists, as a journal has them."""
        where = "fixed" if "box" in self.fixed else "boxes"
        if "box" in self.fixed and self.boxes:
            raise OptionsError("boxes are what is searched: give them or a fixed box, not both.")
        chosen = [self.fixed["box"]] if "box" in self.fixed else list(self.boxes)
        chosen = [box if isinstance(box, str) else list(box) for box in chosen]
        for box in chosen:
            if wrong := problem(box, self.block_size):
                raise OptionsError(f"{where}: {wrong}.")
        object.__setattr__(self, "boxes", tuple(chosen) or tuple(shapes(self.grid, self.block_size)))
        if "box" in self.fixed:
            object.__setattr__(self, "fixed", {**self.fixed, "box": chosen[0]})

    def _check_captures(self) -> None:
        if ("captured" in self.proxies) != bool(self.captures):
            raise OptionsError("the proxy 'captured' and captures (files of record_attention) belong together.")
        for capture in self.captures:
            if capture.tokens != self.tokens:
                raise OptionsError(
                    f"captures: {capture.path} is of {capture.tokens} tokens, but grid and text have {self.tokens}."
                )
            if capture.head_dim != self.head_dim:
                raise OptionsError(
                    f"captures: {capture.path} is of head_dim {capture.head_dim}, but head_dim is {self.head_dim}."
                )

    @staticmethod
    def _check_integer(name: str, value: Any, least: int) -> None:
        try:
            number = operator.index(value)
        except TypeError:
            number = least - 1
        if isinstance(value, bool) or number < least:
            raise OptionsError(f"{name} must be an integer of at least {least}, got {value!r}.")

    @staticmethod
    def _check_names(name: str, values: Sequence[str], known: Sequence[str]) -> None:
        for value in values:
            if value not in known:
                raise OptionsError(
                    f"{name} must be among {list(known)}, got {value!r}.{nearest(str(value), list(known))}"
                )
        if not values or len(set(values)) < len(values):
            raise OptionsError(f"{name} must be different names among {list(known)}, got {list(values)!r}.")

    @property
    def tokens(self) -> int:
        """Tokens of text and video."""
        frames, height, width = self.grid
        return self.text_before + frames * height * width + self.text_after

    @property
    def blocks(self) -> int:
        """Blocks of the sequence."""
        return cdiv(self.tokens, self.block_size)

    def proxy_heads(self, proxy: str) -> int:
        """Heads of a draw of a proxy."""
        if proxy == "captured":
            return max(capture.heads for capture in self.captures)
        return min(self.heads, 2) if proxy == "published" else self.heads

    def captures_of(self, regime: str, held_out: bool) -> list[tuple[int, Capture]]:
        """(number, capture) of a regime, or all where it has none: those searched on, or those held out.

        A third is held out, at least one; where there is a single one, none.
        """
        numbered = list(enumerate(self.captures))
        own = [entry for entry in numbered if entry[1].regime == regime] or numbered
        if len(own) == 1:
            return [] if held_out else own
        cut = len(own) - max(1, len(own) // 3)
        return own[cut:] if held_out else own[:cut]

    def holds_out(self, regime: str) -> bool:
        """Whether the searches of a regime leave something unseen: proxies draw anew, of captures there must be two."""
        return self.proxies != ("captured",) or bool(self.captures_of(regime, held_out=True))

    def sampled_rows(self, proxy: str) -> int:
        """Query rows that a head of a proxy is judged by."""
        rows = self.rows
        if rows is None:
            floats = 2 * min(CHANNELS, self.head_dim) + 3
            rows = TABLE_FLOATS // (self.proxy_heads(proxy) * self.blocks * floats * len(self.boxes))
            rows = max(64, rows)
        return min(rows, self.tokens)

    @property
    def searches(self) -> list[tuple[str, str]]:
        """(regime, mode) of every search, in the order in which they run."""
        return [(regime, mode) for regime in REGIMES for mode in self.modes]

    def as_json(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and text."""
        plain = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
