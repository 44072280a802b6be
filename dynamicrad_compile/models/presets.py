"""Transformer classes of diffusers that `dynamicrad explain` knows: their inputs, and presets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..errors import DynamicRadError

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
    chunk        frames and latents of each chunk of a video that is encoded in chunks, of which the last has as many
                 frames as others have latents, and two latents; then `compression` says pixels only
    depth        configuration keys that count layers
    """

    inputs: Callable[[Config, Latents], Inputs]
    compression: tuple[int, int] = (4, 8)
    chunk: tuple[int, int] | None = None
    depth: tuple[str, ...] = ("num_layers",)


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long, device="cpu")


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
        "visual_rope_pos": [
            torch.arange(n, device="cpu") for n in (size.frames, size.height // patch_h, size.width // patch_w)
        ],
        "text_rope_pos": torch.arange(256, device="cpu"),
    }


def _sana_video(config: Config, size: Latents) -> Inputs:
    return {
        "hidden_states": _video(config, size),
        "timestep": _floats(1),
        "encoder_hidden_states": _floats(1, 300, config["caption_channels"]),
        "encoder_attention_mask": _ones(1, 300),
    }


def _minimax_h3(config: Config, size: Latents) -> Inputs:
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    text, seconds = 256, (17 * (size.frames - 2) // 5 + 5) / 24
    tags = {"audio_tag": 2, "video_tag": 0}
    with unset_fake_temporarily():  # where the video lies is told by the values of positions
        positions, tokens, video, audio, prompt, *_ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            _ones(text), size.frames, size.height, size.width, round(40 * seconds), config["patch_size"], 2, **tags
        )
    patch_t, patch_h, patch_w = config["patch_size"]
    return {
        "hidden_states": _floats(1, len(video), config["in_channels"] * patch_t * patch_h * patch_w),
        "audio_hidden_states": _floats(1, len(audio), config["audio_in_channels"]),
        "encoder_hidden_states": _floats(1, text, config["text_dim"]),
        "timestep": _floats(1),
        "timestep_indices": torch.zeros_like(tokens),
        "token_tags": tokens,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": prompt,
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
    "MiniMaxH3Transformer3DModel": Family(_minimax_h3, (1, 16), (17, 5), ("num_layers", "num_refiner_layers")),
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
    "minimax-h3": ("MiniMaxH3Transformer3DModel", {}),
}

HUB_IDS: dict[str, str] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan-1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan-14b",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "wan-14b-i2v",
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": "wan-vace-1.3b",
    "hunyuanvideo-community/HunyuanVideo": "hunyuan",
    "THUDM/CogVideoX-2b": "cogvideox-2b",
    "THUDM/CogVideoX-5b": "cogvideox-5b",
    "Lightricks/LTX-Video": "ltx",
    "rhymes-ai/Allegro": "allegro",
}
"""Presets that have the sizes of a model on Hugging Face, by its id."""
