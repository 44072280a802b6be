"""Attention of a running model, kept for the tuner: queries, keys and values of a few heads.

    with drad.record_attention(pipe.transformer, "mid.safetensors", (21, 30, 52), regime="mid"):
        pipe("A dog runs along the beach")
    drad.tune((21, 30, 52), "mine.toml", captures=["mid.safetensors"])

The proxies guess how a model attends; this is how it does.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..beforehand import output_file
from ..errors import DynamicRadError, OptionsError, nearest
from ..files import whole_file
from ..models.hook import Place, attention_hook
from ..optional import optional
from ..profiles import REGIMES


@dataclass(frozen=True)
class Capture:
    """A file of `record_attention`: heads of `tokens` x `head_dim`, and the SHA-256 of its bytes."""

    path: str
    regime: str
    heads: int
    tokens: int
    head_dim: int
    sha256: str


@contextmanager
def record_attention(
    model: torch.nn.Module,
    output: str | Path,
    grid: Sequence[int],
    *,
    regime: str,
    text: tuple[int, int] = (0, 0),
    heads: int = 16,
    seed: int = 0,
) -> Iterator[None]:
    """While it is open, keep q, k and v of some heads of the video self-attention of `model`, then write them.

    model   the transformer, not compiled; run it as always, on any device, by a pipeline or by hand
    output  the .safetensors file; 6 bytes x heads x tokens x head_dim
    grid    (frames, height, width) of the video in latent tokens, as `explain` reports it
    regime  motion of what is generated: low, mid or high
    text    text tokens before and after the video in the same attention
    heads   so many are kept, drawn evenly from all steps, layers, rows of the batch and heads

    Raises OptionsError for values out of range, and DynamicRadError if no attention of so many tokens was met or one
    has a mask, dropout or causality; nothing is written then.
    """
    path = check_recording(output, regime, heads, seed)
    save_file = _safetensors("torch").save_file
    tokens = math.prod(grid) + sum(text)
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[float, int, Tensor]] = []  # a heap: (rank, number, [q, k, v]); the highest ranks stay
    met = 0

    def keep(place: Place, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        nonlocal met
        if not q.shape[1] == k.shape[1] == v.shape[1] or q.shape[-1] != v.shape[-1]:
            raise DynamicRadError(f"site {place.site} has fewer key heads than query heads, or values of another size.")
        stretch = 1.0 if scale is None else scale * math.sqrt(q.shape[-1])  # the tuner's scale is 1 / sqrt(head_dim)
        for number, rank in enumerate(
            torch.rand(q.shape[0] * q.shape[1], generator=generator, dtype=torch.float32, device="cpu").tolist()
        ):
            met += 1
            if len(kept) == heads and rank <= kept[0][0]:
                continue
            row, head = divmod(number, q.shape[1])
            found = torch.stack([x[row, head].detach() for x in (q * stretch if stretch != 1.0 else q, k, v)])
            entry = (rank, met, found.to("cpu", found.dtype if found.dtype == torch.bfloat16 else torch.float16))
            (heapq.heappushpop if len(kept) == heads else heapq.heappush)(kept, entry)

    with attention_hook(model, tokens, keep):
        yield
    q, k, v = torch.stack([entry[2] for entry in sorted(kept, key=lambda entry: entry[1])], dim=1)
    with whole_file(path) as partial:
        save_file({"q": q.clone(), "k": k.clone(), "v": v.clone()}, partial, {"regime": regime})


def check_recording(output: str | Path, regime: str, heads: int, seed: int) -> Path:
    """The path to write to, if all this fits `record_attention` and can be written; else OptionsError.

    Raises DynamicRadError without safetensors.
    """
    path = Path(output)
    if path.suffix != ".safetensors":
        raise OptionsError(f"output must be the path of a .safetensors file, got {str(output)!r}.")
    output_file(path, OptionsError)
    if regime not in REGIMES:
        raise OptionsError(f"regime must be among {list(REGIMES)}, got {regime!r}.{nearest(str(regime), REGIMES)}")
    for name, value, least in (("heads", heads, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionsError(f"{name} must be an integer of at least {least}, got {value!r}.")
    _safetensors("torch")
    return path


def read_capture(path: str | Path) -> Capture:
    """What a file of `record_attention` holds. Raises OptionsError for a file that is none."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            regime = (file.metadata() or {}).get("regime")
            names = set(file.keys())
            shapes = [tuple(file.get_slice(name).get_shape()) for name in "qkv"] if names == set("qkv") else [()]
    except (OSError, safetensors.SafetensorError) as error:
        raise OptionsError(f"captures: {path} can't be read: {error}.") from None
    if regime not in REGIMES or len(shapes[0]) != 3 or len(set(shapes)) > 1:
        raise OptionsError(f"captures: {path} was not written by record_attention.")
    heads, tokens, head_dim = shapes[0]
    return Capture(str(path), regime, heads, tokens, head_dim, _sha256(path))


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def load_capture(capture: Capture) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, float32 [heads, tokens, head_dim] each.

    Raises OptionsError if they are not finite, and if the file at the path is not the one that was read: the machine of
    a worker may have another one there, or none.
    """
    try:
        same = _sha256(capture.path) == capture.sha256
    except OSError as error:
        raise OptionsError(
            f"captures: {capture.path} can't be read on {platform.node()}: {error.strerror}. Give paths at which all "
            "workers find the files."
        ) from None
    if not same:
        raise OptionsError(
            f"captures: {capture.path} on {platform.node()} is not the file that the search was begun with. Give paths "
            "at which all workers find the same files."
        )
    found: dict[str, Any] = _safetensors("torch").load_file(capture.path)
    q, k, v = (found[name].float() for name in "qkv")
    if not all(bool(x.isfinite().all()) for x in (q, k, v)):
        raise OptionsError(f"captures: {capture.path} has values that are not finite.")
    return q, k, v


def _safetensors(part: str = "") -> Any:
    return optional(f"safetensors.{part}".rstrip("."), "recorded attention needs", "tune")
