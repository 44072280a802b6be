"""The part of the quickstart that runs diffusers' WanPipeline: a checkpoint, or random weights to measure time with."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

WIDTHS = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096}  # Wan2.1-1.3B
TEXT_TOKENS = 512
PROMPT = "A cat surfs a wave at sunset"


class WanModel:
    """A Wan pipeline; `transformer` is what is compiled, `generate` runs the pipeline with a compiled one."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.model:
            try:
                self.pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(args.device)
            except (OSError, ValueError) as error:
                raise SystemExit(f"--model {args.model}: no Wan pipeline can be loaded there: {error}") from None
        else:
            self.pipe = random_pipeline(args.layers, args.device, args.seed)
        self.transformer = self.pipe.transformer
        self.arguments = call_arguments(self.pipe, args)
        self.tokens = ((args.frames - 1) // 4 + 1) * (args.height // 16) * (args.width // 16)
        self.dense_steps = 0
        self.options: dict[str, Any] = {}

    def generate(self, compiled: Any) -> tuple[torch.Tensor, list[float]]:
        """Latents [1, channels, frames, height, width] of one run and the seconds of each step."""
        self.pipe.transformer = compiled
        ends = []

        def note_time(pipe: WanPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            return tensors

        generator = torch.Generator().manual_seed(self.args.seed)  # on the CPU: the same noise on every machine
        start = time.perf_counter()
        latents = self.pipe(**self.arguments, generator=generator, callback_on_step_end=note_time).frames
        return latents, [end - begin for begin, end in zip([start, *ends], ends, strict=False)]

    def compare(self, results: dict[str, torch.Tensor]) -> None:
        """Print how far apart the latents are."""
        error = (results["sparse"] - results["dense"]).float().norm() / results["dense"].float().norm()
        print(f"\nrelative difference of the latents: {error:.4f}")
        if not self.args.model:
            print("With random weights this figure says nothing about quality; leave out --random to see a video.")

    def write(self, results: dict[str, torch.Tensor], path: Path) -> None:
        """Animated WebP, dense left and sparse right."""
        print("\ndecoding ...")
        save_side_by_side(*decode(self.pipe, torch.cat([results["dense"], results["sparse"]])), path)


def random_pipeline(layers: int, device: str, seed: int) -> WanPipeline:
    """WanPipeline at the widths of Wan2.1-1.3B with few layers and a narrow VAE, all weights random."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(**WIDTHS, num_layers=layers)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=0)
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    )
    pipe.to(device)
    return pipe.to(torch.bfloat16) if device.startswith("cuda") else pipe


def call_arguments(pipe: WanPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline call that both runs share."""
    shared: dict[str, Any] = {
        "height": args.height,
        "width": args.width,
        "num_frames": args.frames,
        "num_inference_steps": args.steps,
        "output_type": "latent",
    }
    if args.model:
        return {**shared, "prompt": args.prompt[0] if args.prompt else PROMPT}
    prompt = torch.randn(1, TEXT_TOKENS, WIDTHS["text_dim"], generator=torch.Generator().manual_seed(args.seed))
    embeds = prompt.to(pipe.device, pipe.transformer.dtype)
    return {**shared, "prompt_embeds": embeds, "guidance_scale": 1.0}


@torch.no_grad()
def decode(pipe: WanPipeline, latents: torch.Tensor) -> list[list[Any]]:
    """Pictures of each video, as the pipeline itself decodes them."""
    config = pipe.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1).to(latents)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1).to(latents)
    video = pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.video_processor.postprocess_video(video, output_type="pil")


def save_side_by_side(left: list[Any], right: list[Any], path: Path) -> None:
    """Animated WebP at 16 frames a second; pillow writes it without a video encoder."""
    from PIL import Image

    frames = []
    for a, b in zip(left, right, strict=True):
        frame = Image.new("RGB", (a.width + b.width, a.height))
        frame.paste(a, (0, 0))
        frame.paste(b, (a.width, 0))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // 16, loop=0, quality=70)
