"""From how many tokens on block-sparse attention pays: a table of measured or estimated speed-ups, and its reader.

`crossover.toml` holds, for an architecture and a dtype, the ratio dense time / sparse time of the attention alone at
some lengths, sparsities and head_dims, and says whether it was measured (where, when, with what) or estimated by a cost
model. `min_tokens="auto"` leaves a site dense if the table expects less than MIN_GAIN of it. Between entries

    1 / ratio = sparse time / dense time

is taken to be linear in the sparsity, as time is linear in the blocks kept, and in the logarithm of the tokens; the
ratio is never more than the ideal 1 / (1 - sparsity). Above the longest length its figure stands; below the shortest
the line through the first two goes on. benchmarks/crossover.py writes the file.
"""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import CrossoverError
from ..files import toml_value, tomllib, whole_file
from ..problems import problems

TABLE = Path(__file__).with_name("crossover.toml")
MIN_GAIN = 1.05
"""A site whose attention is expected to gain less stays dense."""
SCHEMA = 1
_HEADER = """\
# Expected speed-up of block-sparse attention over dense: see dynamicrad_compile/plans/crossover.py.
# Written by benchmarks/crossover.py. rows = [tokens, head_dim, sparsity, dense time / sparse time].
"""


class Row(NamedTuple):
    """Speed-up of the attention alone at one length, head_dim and sparsity (compensation counted)."""

    tokens: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=1, le=256)]
    sparsity: Annotated[float, Field(ge=0.0, le=1.0)]
    ratio: Annotated[float, Field(gt=0.0, le=1000.0)]


class Table(BaseModel):
    """Figures of one architecture and dtype, and where they are from.

    arch    "cpu", or sm_NN of a compute capability
    dtype   "half" for float16 and bfloat16, "float" for float32
    source  "measured", or "estimated" by a cost model
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: Annotated[str, Field(pattern=r"^(cpu|sm_\d+)$")]
    dtype: Literal["half", "float"]
    source: Literal["measured", "estimated"]
    machine: str
    date: datetime.date
    versions: str
    command: str
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    tables: tuple[Table, ...]

    @model_validator(mode="after")
    def _each_once(self) -> _File:
        names = [(table.arch, table.dtype) for table in self.tables]
        if len(set(names)) < len(names):
            raise ValueError("each architecture and dtype must come once")
        return self


class Gain(NamedTuple):
    """Expected dense time / sparse time of an attention, and where the figure is from."""

    ratio: float
    source: str  # "measured" or "estimated"
    arch: str
    machine: str
    date: datetime.date

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x of dense ({self.source} for {self.arch}: {self.machine}, {self.date})"


@functools.lru_cache(maxsize=4)
def load(path: Path = TABLE) -> tuple[Table, ...]:
    """The tables of a file, checked. Raises CrossoverError, which names the file and what is wrong in it."""
    try:
        return _File.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8"))).tables
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise CrossoverError(f"the crossover table {path} can't be read: {error}. Reinstall the package.") from None
    except ValidationError as error:
        raise CrossoverError(
            f"the crossover table {path} is wrong at {problems(error, _File)[0]} "
            "Make it again with benchmarks/crossover.py, or reinstall the package."
        ) from None


def save(tables: Sequence[Table], path: Path) -> None:
    """Write tables to a file; the old one stays if anything goes wrong. Raises CrossoverError, OSError."""
    blocks = [_HEADER + f"schema = {SCHEMA}\n"]
    for table in tables:
        texts = {name: getattr(table, name) for name in ("arch", "dtype", "source", "machine", "versions", "command")}
        lines = [
            "[[tables]]",
            *(f"{name} = {toml_value(text)}" for name, text in texts.items()),
            f"date = {table.date}",
        ]
        rows = [f"  [{row.tokens}, {row.head_dim}, {row.sparsity:g}, {row.ratio:g}]," for row in table.rows]
        blocks.append("\n".join([*lines, "rows = [", *rows, "]\n"]))
    with whole_file(path) as partial:
        partial.write_text("\n".join(blocks), encoding="utf-8")
        load(partial)
    load.cache_clear()


def architecture(device: torch.device) -> str | None:
    """ "cpu", or sm_NN of a CUDA device; None for other devices and where no GPU can be asked."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def expected_gain(
    arch: str,
    tokens: int,
    sparsity: float,
    head_dim: int = 128,
    half: bool = True,
    tables: Sequence[Table] | None = None,
) -> Gain | None:
    """Expected dense time / sparse time of one attention; None where no table serves the architecture.

    arch      "cpu" or "sm_NN"; a GPU without a table takes the newest older one
    tokens    length of the sequence, at least 1
    sparsity  share of dense attention that is skipped, 0..1, compensation counted
    half      float16 or bfloat16; where only the other dtype has a table, that is taken
    tables    instead of the shipped ones. Raises CrossoverError if those can't be loaded.
    """
    table = table_for(load() if tables is None else tables, arch, half)
    if table is None:
        return None
    dims = {row.head_dim for row in table.rows}
    nearest = min(dims, key=lambda dim: (abs(math.log(dim / head_dim)), dim))
    by_length: dict[int, dict[float, float]] = {}
    for row in table.rows:
        if row.head_dim == nearest:
            by_length.setdefault(row.tokens, {})[row.sparsity] = 1.0 / row.ratio
    points = {math.log2(n): _on_line(cost, sparsity) for n, cost in by_length.items()}
    at = math.log2(max(tokens, 1))
    share = _on_line(points, min(at, max(points)))
    if at < min(points):  # never better than what the shortest length gave
        share = max(share, points[min(points)])
    share = max(share, 1.0 - sparsity, 1e-3)
    return Gain(1.0 / share, table.source, table.arch, table.machine, table.date)


def first_length(
    tables: Sequence[Table], arch: str, sparsity: float, head_dim: int = 128, half: bool = True
) -> int | None:
    """The first length from 128 tokens on, in steps of a quarter, that is expected to gain MIN_GAIN; None if none."""
    for tokens in (128, 256, 384, *sorted(n << k for n in (512, 640, 768, 896) for k in range(10))):
        gain = expected_gain(arch, tokens, sparsity, head_dim, half, tables)
        if gain is not None and gain.ratio >= MIN_GAIN:
            return tokens
    return None


def table_for(tables: Sequence[Table], arch: str, half: bool = True) -> Table | None:
    """The table that serves an architecture, or the newest older one; None if there is none."""

    def number(name: str) -> int:
        return int(name.removeprefix("sm_")) if name.startswith("sm_") else -1

    older = [t for t in tables if t.arch == arch or 0 <= number(t.arch) <= number(arch)]
    dtype = "half" if half else "float"
    return max(older, key=lambda t: (number(t.arch), t.dtype == dtype), default=None)


def _on_line(points: dict[float, float], x: float) -> float:
    """Piecewise linear through the points; the first and the last piece go on."""
    known = sorted(points.items())
    if len(known) == 1:
        return known[0][1]
    above = next((i for i, (at, _) in enumerate(known) if at > x), len(known) - 1)
    (x0, y0), (x1, y1) = known[max(above, 1) - 1], known[max(above, 1)]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
