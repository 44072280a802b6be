"""Transformers of diffusers without weights, for `dynamicrad explain`.

A model is built from its class and configuration out of fake tensors: no weights are read or allocated, so a 14B
transformer costs no more than a small one. Sizes are those of a pipeline call: frames and pixels.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import DynamicRadError, nearest
from ..kernels.blocks import cdiv
from ..optional import optional
from ..reporting.report import starred
from .cache import cached_folder
from .presets import FAMILIES, HUB_IDS, PRESETS, Config, Inputs, Latents


def build(
    name: str, *, frames: int = 81, height: int = 480, width: int = 832, layers: int = 2
) -> tuple[torch.nn.Module, Inputs]:
    """Transformer made of fake tensors, and keyword arguments for its forward.

    name           a preset, a transformer class of diffusers, a path (a pipeline folder, its transformer folder, or the
                   config.json in it; weights are not read), or an id of Hugging Face whose configuration is in the
                   local cache, or that is one of HUB_IDS
    frames         frames of the video
    height, width  pixels of the video
    layers         keep only so many layers of each kind; 0 keeps all

    Raises DynamicRadError if the name is not known, if diffusers is missing, or if a size does not fit.
    """
    cls, config, inputs = specify(name, frames=frames, height=height, width=width, layers=layers)
    # Real tensors may be mixed in: diffusers makes constants, such as Kandinsky's positions, while it builds.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = cls.from_config(config)
        return model.eval(), inputs()


def other_flops(model: torch.nn.Module, inputs: Inputs) -> int:
    """FLOPs of the matrix products and convolutions of a call, without softmax attention; of a model of `build`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = counter.get_flop_counts().get("Global", {})  # empty where nothing was counted
    return sum(count for op, count in counts.items() if "attention" not in str(op))


def repeats(part: torch.nn.Module, whole: torch.nn.Module) -> Callable[[str], float]:
    """How many modules of a model stand behind one of the same model with fewer layers, by its path."""
    counts = [Counter(starred(name) for name, _ in model.named_modules()) for model in (part, whole)]
    return lambda path: counts[1][starred(path)] / max(counts[0][starred(path)], 1)


def specify(
    name: str, *, frames: int, height: int, width: int, layers: int
) -> tuple[Any, Config, Callable[[], Inputs]]:
    """Class of a transformer, its configuration, and a function that makes arguments of its forward; see `build`."""
    diffusers = optional("diffusers", "models by name need", "diffusers")
    if layers < 0:
        raise DynamicRadError(f"layers must be at least 0 (0 keeps all), got {layers}.")
    class_name, config, compression = _find(name)
    family = FAMILIES[class_name]
    cls = getattr(diffusers, class_name, None)
    if cls is None:
        raise DynamicRadError(f"diffusers {diffusers.__version__} has no {class_name}; a newer version is needed.")
    full = {**_defaults(cls), **config}
    if layers:
        full.update({key: min(layers, full[key]) for key in family.depth})
        if "vace_layers" in full:
            full["vace_layers"] = [i for i in full["vace_layers"] if i < layers]
    size = _latents(full, compression or family.compression, frames, height, width, family.chunk)
    if class_name == "CosmosTransformer3DModel":  # a channel that tells padding; it needs torchvision
        full["concat_padding_mask"] = False
    if class_name == "CogVideoXTransformer3DModel":  # the position table is made for one size
        full.update(sample_height=size.height, sample_width=size.width, sample_frames=frames)
    return cls, full, lambda: {**family.inputs(full, size), "return_dict": False}


def _find(name: str) -> tuple[str, Config, tuple[int, int] | None]:
    """Class name, configuration and the VAE's compression (None = the family's) of a preset, class or path."""
    if name in PRESETS:
        return (*PRESETS[name], None)
    if name in FAMILIES:
        return name, {}, None
    path = Path(name)
    if not path.exists():
        cached = cached_folder(name)
        if cached is None and name in HUB_IDS:
            return (*PRESETS[HUB_IDS[name]], None)
        path = cached or path
    if not path.exists():
        known = [*PRESETS, *FAMILIES]
        raise DynamicRadError(
            f"no model {name!r}: not a preset ({', '.join(PRESETS)}), not a transformer class that is known "
            f"here, and no such path.{nearest(name, known)}"
        )
    config = _read_config(path)
    class_name = config.pop("_class_name", None)
    if class_name not in FAMILIES:
        raise DynamicRadError(
            f"{name} holds a {class_name}; known here are {', '.join(FAMILIES)}. "
            "For another model call dynamicrad_compile.explain(model, *args, **kwargs) in Python."
        )
    return class_name, {k: v for k, v in config.items() if not k.startswith("_")}, _compression(path)


def _read_config(path: Path) -> Config:
    places = [path] if path.is_file() else [path / "transformer" / "config.json", path / "config.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DynamicRadError(f"{path} has neither transformer/config.json nor config.json.")
    return _json(file)


def _compression(path: Path) -> tuple[int, int] | None:
    """Compression that the pipeline's VAE states, if the path is in a pipeline folder."""
    root = path.parent if path.is_file() else path
    for folder in (root, root.parent):
        file = folder / "vae" / "config.json"
        if file.is_file():
            vae = _json(file)
            factors = vae.get("scale_factor_temporal"), vae.get("scale_factor_spatial")
            return factors if all(isinstance(n, int) for n in factors) else None  # type: ignore[return-value]
    return None


def _json(file: Path) -> Config:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DynamicRadError(f"{file} can't be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise DynamicRadError(f"{file} is not a diffusers configuration: expected a JSON object.")
    return content


def _defaults(cls: type) -> Config:
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _latents(
    config: Config,
    compression: tuple[int, int],
    frames: int,
    height: int,
    width: int,
    chunk: tuple[int, int] | None = None,
) -> Latents:
    """Latent size of a video; one in chunks gets what frames it lacks. Raises DynamicRadError if it does not divide."""
    time, space = compression
    patch = config["patch_size"]
    patch_h, patch_w = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    if frames < 1 or (frames - 1) % time:
        raise DynamicRadError(f"frames must be {time} x n + 1 for this model, got {frames}.")
    for name, value, unit in (("height", height, space * patch_h), ("width", width, space * patch_w)):
        if value < unit or value % unit:
            raise DynamicRadError(f"{name} must be a multiple of {unit} pixels for this model, got {value}.")
    latents = (frames - 1) // time + 1
    if chunk is not None:
        latents = max(0, cdiv(frames - chunk[1], chunk[0])) * chunk[1] + 2
    return Latents(latents, height // space, width // space)
