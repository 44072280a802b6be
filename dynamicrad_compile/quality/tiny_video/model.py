"""The tiny video model: diffusers' WanTransformer3DModel as it is, on pixels, and a text encoder of three tables.

    transformer, text = load(CHECKPOINT)
    video = sample(transformer, text, ["A red circle bounces quickly on a gray background."], seed=0)

`sample` takes any callable in place of the transformer that is called like it, a compiled one for example.
A checkpoint is one safetensors file (keys transformer.* and text.*) with a config.json beside it.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...files import whole_file, write_file
from ...optional import optional
from . import data

CHECKPOINT = Path(__file__).parent / "checkpoint"
TRANSFORMER = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 64,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 6,
    "rope_max_seq_len": 256,
}
TEXT_TOKENS = 20
SHIFT = 4.0  # of the noise levels, in training and sampling
STEPS, GUIDANCE = 20, 3.0  # of sampling
PAD, UNKNOWN = 0, 1  # ids in front of the vocabulary


class TextEncoder(nn.Module):
    """Captions to [batch, TEXT_TOKENS, dim]: a vector for each word, for the word that follows, and for the place."""

    def __init__(self, vocabulary: Sequence[str], dim: int = 64) -> None:
        super().__init__()
        self.ids = {word: index for index, word in enumerate(vocabulary, 2)}
        self.word = nn.Embedding(len(self.ids) + 2, dim)
        self.following = nn.Embedding(len(self.ids) + 2, dim)
        self.place = nn.Embedding(TEXT_TOKENS, dim)

    @staticmethod
    def words(caption: str) -> list[str]:
        """Words of a caption as the vocabulary has them."""
        return re.findall(r"[^\W_]+", caption.lower())

    def tokens(self, captions: Sequence[str]) -> torch.Tensor:
        """Word ids [batch, TEXT_TOKENS]; words outside the vocabulary share one id. ValueError if a caption is long."""
        rows = []
        for caption in captions:
            ids = [self.ids.get(word, UNKNOWN) for word in self.words(caption)]
            if len(ids) > TEXT_TOKENS:
                raise ValueError(f"a caption may have {TEXT_TOKENS} words, got {len(ids)}: {caption!r}.")
            rows.append(ids + [PAD] * (TEXT_TOKENS - len(ids)))
        return torch.tensor(rows, dtype=torch.int64, device=self.word.weight.device)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of word ids [batch, TEXT_TOKENS]."""
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], PAD)], dim=1)
        return self.word(tokens) + self.following(following) + self.place.weight

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Embeddings of captions; the empty caption is the unconditional one."""
        return self(self.tokens(captions))


def create(config: dict[str, Any] | None = None, vocabulary: Sequence[str] | None = None) -> tuple[Any, TextEncoder]:
    """Transformer and text encoder with fresh weights; the last layer is zero, so training starts at velocity 0."""
    config = dict(TRANSFORMER, **(config or {}))
    transformer = _diffusers().WanTransformer3DModel(**config)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer, TextEncoder(vocabulary or data.vocabulary(), config["text_dim"])


def state(transformer: nn.Module, text: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of both under the names of a checkpoint."""
    parts = {"transformer": transformer, "text": text}
    return {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}


def parameters(transformer: nn.Module, text: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of both under the names of a checkpoint."""
    parts = {"transformer": transformer, "text": text}
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def save(path: str | os.PathLike[str], weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Writes weights to the safetensors file `path` and config.json beside it, each in one piece."""
    path = Path(path)
    write_file(path.parent / "config.json", json.dumps(config, indent=1) + "\n")
    with whole_file(path) as partial:
        _safetensors().save_file({key: value.detach().contiguous() for key, value in weights.items()}, partial)


def load(path: str | os.PathLike[str], device: str = "cpu") -> tuple[Any, TextEncoder]:
    """(transformer, text encoder) in eval mode, from a .safetensors file or a folder with model.safetensors.

    FileNotFoundError or ValueError says what is missing or does not fit.
    """
    weights, settings = _files(path)
    for file in (weights, settings):
        if not file.is_file():
            raise FileNotFoundError(f"a checkpoint needs {file}, which is not there.")
    config = json.loads(settings.read_text(encoding="utf-8"))
    missing = {"transformer", "vocabulary"} - set(config)
    if missing:
        raise ValueError(f"{settings} has no {', '.join(sorted(missing))}; it was not written by tiny_video.")
    transformer, text = create(config["transformer"], config["vocabulary"])
    try:
        tensors = _safetensors().load_file(weights)
    except optional("safetensors", "checkpoints need", "eval").SafetensorError as error:
        raise ValueError(f"{weights} is not a safetensors file: {error}.") from None
    for name, module in (("transformer", transformer), ("text", text)):
        prefix = name + "."
        part = {key[len(prefix) :]: value.float() for key, value in tensors.items() if key.startswith(prefix)}
        module.load_state_dict(part)
        module.to(device).eval().requires_grad_(False)
    return transformer, text


def size_of(path: str | os.PathLike[str]) -> int:
    """Pixels of a side of the clips that a checkpoint was trained on."""
    return int(json.loads(_files(path)[1].read_text(encoding="utf-8")).get("size", data.SIZE))


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Weights and config.json of a checkpoint, a folder or its weights."""
    weights = Path(path)
    weights = weights / "model.safetensors" if weights.is_dir() else weights
    return weights, weights.parent / "config.json"


def sample(
    transformer: Callable[..., Any],
    text: TextEncoder,
    captions: Sequence[str],
    seed: int = 0,
    frames: int = data.FRAMES,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    size: tuple[int, int] = (data.SIZE, data.SIZE),
    progress: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Videos [batch, 3, frames, height, width], float32 in -1..1; clip i starts from the noise of seed + i.

    With guidance_scale other than 1 a call of the transformer has both batches, [captions | empty captions].
    `progress` wraps the timesteps, as tqdm does.
    """
    after_each = denoise(transformer, text, captions, seed, frames, steps, guidance_scale, size, progress)
    return deque(after_each, maxlen=1)[0]


def denoise(
    transformer: Callable[..., Any],
    text: TextEncoder,
    captions: Sequence[str],
    seed: int = 0,
    frames: int = data.FRAMES,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    size: tuple[int, int] = (data.SIZE, data.SIZE),
    progress: Callable[..., Any] | None = None,
) -> Iterator[torch.Tensor]:
    """The videos of `sample` after each step, for a caller that does something else between two steps."""
    device = text.word.weight.device
    shape = (1, 3, frames, *size)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float32, device="cpu")
        for i in range(len(captions))
    ]
    video = torch.cat(noise).to(device)
    guided = guidance_scale != 1
    with torch.no_grad():
        embeds = text.encode([*captions, *[""] * len(captions)] if guided else captions)
    scheduler = _diffusers().FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps, device=device)
    for t in progress(scheduler.timesteps) if progress else scheduler.timesteps:
        inputs = torch.cat([video, video]) if guided else video
        with torch.no_grad():  # not around the `yield`: the caller's own mode holds there
            velocity = transformer(
                hidden_states=inputs,
                timestep=t.expand(len(inputs)),
                encoder_hidden_states=embeds,
                return_dict=False,
            )[0]
        if guided:
            wanted, free = velocity.chunk(2)
            velocity = free + guidance_scale * (wanted - free)
        video = scheduler.step(velocity, t, video, return_dict=False)[0]
        yield video.clamp(-1, 1)


def _diffusers() -> Any:
    return optional("diffusers", "the tiny video model needs", "eval")


def _safetensors() -> Any:
    return optional("safetensors.torch", "the tiny video model needs", "eval")
