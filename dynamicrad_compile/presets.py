"""Video transformers of diffusers without weights, and inputs that fit them, for `dynamicrad explain`.

A model is built from its class and configuration out of fake tensors: no weights are read or allocated, so a 14B
transformer costs no more than a small one. Sizes are those of a pipeline call: frames and pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from .errors import DynamicRadError, nearest

Config = dict[str, Any]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Latents:
    """Size of the latent video before patchifying, and of what goes with it."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Family:
    """What is needed to call a transformer class.

    inputs       keyword arguments of `forward` for a configuration and a latent size
    compression  how many frames (after the first) and pixels a side one latent holds
    depth        configuration keys that count layers
    """

    inputs: Callable[[Config, Latents], Inputs]
    compression: tuple[int, int] = (4, 8)
    depth: tuple[str, ...] = ("num_layers",)


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(*shape)


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long)


def _video(config: Config, size: Latents, channels: str = "in_channels") -> torch.Tensor:
    return _floats(1, config[channels], size.frames, size.height, size.width)


def _wan(config: Config, size: Latents) -> Inputs:
    inputs = {
        "hidden_states": _video(config, size),
        "timestep": _floats(1),
        "encoder_hidden_states": _floats(1, 512, config["text_dim"]),
    }
    if config["image_dim"] is not None:
        inputs["encoder_hidden_states_image"] = _floats(1, 257, config["image_dim"])
    return inputs


def _wan_vace(config: Config, size: Latents) -> Inputs:
    return {
        **_wan(config, size),
        "control_hidden_states": _video(config, size, "vace_in_channels"),
        "control_hidden_states_scale": _floats(len(config["vace_layers"])),
    }


def _hunyuan(config: Config, size: Latents) -> Inputs:
    inputs = {
        "hidden_states": _video(config, size),
        "timestep": _floats(1),
        "encoder_hidden_states": _floats(1, 256, config["text_embed_dim"]),
        "encoder_attention_mask": _ones(1, 256),
        "pooled_projections": _floats(1, config["pooled_projection_dim"]),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = _floats(1)
    return inputs


def _cogvideox(config: Config, size: Latents) -> Inputs:
    patch_t = config["patch_size_t"] or 1
    if size.frames % patch_t:
        raise DynamicRadError(f"this transformer patches {patch_t} latent frames together, got {size.frames}.")
    inputs: Inputs = {
        "hidden_states": _floats(1, size.frames, config["in_channels"], size.height, size.width),
        "timestep": _ones(1),
        "encoder_hidden_states": _floats(1, config["max_text_seq_length"], config["text_embed_dim"]),
    }
    if config["use_rotary_positional_embeddings"]:
        patch = config["patch_size"]
        tokens = (size.frames // patch_t) * (size.height // patch) * (size.width // patch)
        head_dim = config["attention_head_dim"]
        inputs["image_rotary_emb"] = (_floats(tokens, head_dim), _floats(tokens, head_dim))
    if config["ofs_embed_dim"] is not None:
        inputs["ofs"] = _floats(1)
    return inputs


def _easyanimate(config: Config, size: Latents) -> Inputs:
    return {
        "hidden_states": _video(config, size),
        "timestep": _floats(1),
        "encoder_hidden_states": _floats(1, 256, config["text_embed_dim"]),
    }


def _ltx(config: Config, size: Latents) -> Inputs:
    tokens = size.frames * size.height * size.width
    return {
        "hidden_states": _floats(1, tokens, config["in_channels"]),
        "timestep": _floats(1),
        "encoder_hidden_states": _floats(1, 128, config["caption_channels"]),
        "encoder_attention_mask": _ones(1, 128),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx2(config: Config, size: Latents) -> Inputs:
    audio = 126
    inputs = _ltx(config, size)
    del inputs["rope_interpolation_scale"]
    return {
        **inputs,
        "audio_hidden_states": _floats(1, audio, config["audio_in_channels"]),
        "audio_encoder_hidden_states": _floats(1, 128, config["caption_channels"]),
        "audio_encoder_attention_mask": _ones(1, 128),
        "fps": 25.0,
        "audio_num_frames": audio,
    }


def _allegro(config: Config, size: Latents) -> Inputs:
    patch = config["patch_size"]
    grid = (size.frames // config["patch_size_t"], size.height // patch, size.width // patch)
    axis_dim = config["attention_head_dim"] // 3
    tables = tuple((_floats(length, axis_dim), _floats(length, axis_dim)) for length in grid)
    tokens = grid[0] * grid[1] * grid[2]
    return {
        "hidden_states": _video(config, size),
        "timestep": _ones(1),
        "encoder_hidden_states": _floats(1, 512, config["caption_channels"]),
        "encoder_attention_mask": _ones(1, 512),
        "image_rotary_emb": (tables, tuple(_ones(1, tokens) for _ in grid)),
    }


def _cosmos(config: Config, size: Latents) -> Inputs:
    channels = config["in_channels"]
    inputs: Inputs = {
        "timestep": _floats(1),
        "encoder_hidden_states": _floats(1, 512, config["text_embed_dim"]),
        "fps": 30,
    }
    if channels == 17:  # video-to-world: the last channel is the condition mask
        channels = 16
        inputs["condition_mask"] = _floats(1, 1, size.frames, size.height, size.width)
    video = _floats(1, channels, size.frames, size.height, size.width)
    return {"hidden_states": video, **inputs}


def _kandinsky5(config: Config, size: Latents) -> Inputs:
    channels = config["in_visual_dim"] * (2 if config["visual_cond"] else 1) + bool(config["visual_cond"])
    _, patch_h, patch_w = config["patch_size"]
    return {
        "hidden_states": _floats(1, size.frames, size.height, size.width, channels),
        "timestep": _floats(1),
        "encoder_hidden_states": _floats(1, 256, config["in_text_dim"]),
        "pooled_projections": _floats(1, config["in_text_dim2"]),
        "visual_rope_pos": [torch.arange(n) for n in (size.frames, size.height // patch_h, size.width // patch_w)],
        "text_rope_pos": torch.arange(256),
    }


def _sana_video(config: Config, size: Latents) -> Inputs:
    return {
        "hidden_states": _video(config, size),
        "timestep": _floats(1),
        "encoder_hidden_states": _floats(1, 300, config["caption_channels"]),
        "encoder_attention_mask": _ones(1, 300),
    }


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": Family(_wan),
    "WanVACETransformer3DModel": Family(_wan_vace),
    "SkyReelsV2Transformer3DModel": Family(_wan),
    "HunyuanVideoTransformer3DModel": Family(_hunyuan, depth=("num_layers", "num_single_layers")),
    "CogVideoXTransformer3DModel": Family(_cogvideox),
    "EasyAnimateTransformer3DModel": Family(_easyanimate, depth=("num_layers", "mmdit_layers")),
    "LTXVideoTransformer3DModel": Family(_ltx, compression=(8, 32)),
    "LTX2VideoTransformer3DModel": Family(_ltx2, compression=(8, 32)),
    "AllegroTransformer3DModel": Family(_allegro),
    "CosmosTransformer3DModel": Family(_cosmos, compression=(8, 8)),
    "Kandinsky5Transformer3DModel": Family(_kandinsky5, depth=("num_visual_blocks",)),
    "SanaVideoTransformer3DModel": Family(_sana_video),
}

# Name -> class and what differs from the defaults of the class.
PRESETS: dict[str, tuple[str, Config]] = {
    "wan-1.3b": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan-14b": ("WanTransformer3DModel", {}),
    "wan-14b-i2v": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "wan-vace-1.3b": (
        "WanVACETransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "vace_layers": list(range(0, 30, 2))},
    ),
    "skyreels-v2": (
        "SkyReelsV2Transformer3DModel",
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    ),
    "hunyuan": ("HunyuanVideoTransformer3DModel", {}),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}),
    "cogvideox-5b": (
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    ),
    "easyanimate": ("EasyAnimateTransformer3DModel", {"in_channels": 16, "out_channels": 16, "patch_size": 2}),
    "ltx": ("LTXVideoTransformer3DModel", {}),
    "ltx2": ("LTX2VideoTransformer3DModel", {}),
    "allegro": ("AllegroTransformer3DModel", {}),
    "cosmos": ("CosmosTransformer3DModel", {}),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168},
    ),
    "sana-video": ("SanaVideoTransformer3DModel", {}),
}


def build(
    name: str, *, frames: int = 81, height: int = 480, width: int = 832, layers: int = 2
) -> tuple[torch.nn.Module, Inputs]:
    """Transformer made of fake tensors, and keyword arguments for its forward.

    name           a preset, a transformer class of diffusers, or a path: a pipeline folder, its transformer folder,
                   or the config.json in it (weights are not read)
    frames         frames of the video
    height, width  pixels of the video
    layers         keep only so many layers of each kind; 0 keeps all

    Raises DynamicRadError if the name is not known, if diffusers is missing, or if a size does not fit.
    """
    try:
        import diffusers
    except ImportError:
        raise DynamicRadError("this needs diffusers: pip install 'dynamicrad-compile[diffusers]'.") from None
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
    size = _latents(full, compression or family.compression, frames, height, width)
    if class_name == "CosmosTransformer3DModel":  # a channel that tells padding; it needs torchvision
        full["concat_padding_mask"] = False
    if class_name == "CogVideoXTransformer3DModel":  # the position table is made for one size
        full.update(sample_height=size.height, sample_width=size.width, sample_frames=frames)
    # Real tensors may be mixed in: diffusers makes constants, such as Kandinsky's positions, while it builds.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = cls.from_config(full)
        return model.eval(), {**family.inputs(full, size), "return_dict": False}


def _find(name: str) -> tuple[str, Config, tuple[int, int] | None]:
    """Class name, configuration and the VAE's compression (None = the family's) of a preset, class or path."""
    if name in PRESETS:
        return (*PRESETS[name], None)
    if name in FAMILIES:
        return name, {}, None
    path = Path(name)
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
    import inspect

    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _latents(config: Config, compression: tuple[int, int], frames: int, height: int, width: int) -> Latents:
    """Latent size of a video. Raises DynamicRadError if it does not divide."""
    time, space = compression
    patch = config["patch_size"]
    patch_h, patch_w = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    if frames < 1 or (frames - 1) % time:
        raise DynamicRadError(f"frames must be {time} x n + 1 for this model, got {frames}.")
    for name, value, unit in (("height", height, space * patch_h), ("width", width, space * patch_w)):
        if value < unit or value % unit:
            raise DynamicRadError(f"{name} must be a multiple of {unit} pixels for this model, got {value}.")
    return Latents((frames - 1) // time + 1, height // space, width // space)
