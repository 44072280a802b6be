"""Text-to-video with diffusers' WanPipeline, dense and block-sparse, side by side.

    python examples/quickstart.py                                  # random weights, CPU or GPU, about 8,000 tokens
    python examples/quickstart.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A cat on a surfboard"

Nothing in the pipeline is changed: the transformer goes through torch.compile, once with its default backend and
once with backend="dynamicrad". Without --model the transformer has the widths of Wan2.1-1.3B but two layers and
random weights, so times mean something and pictures do not.

Writes to outputs/: comparison.webp (dense left, sparse right), mask.png (which blocks are read), report.html.
"""

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

import dynamicrad_compile as drad
from dynamicrad_compile.plot import frame_boundaries, plot_mask

WIDTHS = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096}  # Wan2.1-1.3B
TEXT_TOKENS = 512


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; sizes left out depend on whether a checkpoint is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or hub name of a Wan text-to-video pipeline")
    parser.add_argument("--prompt", default="A cat surfs a wave at sunset", help="used with --model")
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of blocks to skip (0.8)")
    parser.add_argument("--frames", type=int, help="4 n + 1 (49; 81 with --model)")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (320; 480 with --model)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16 (512; 832 with --model)")
    parser.add_argument("--steps", type=int, help="denoising steps, at least 2 (4; 30 with --model)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the random transformer (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args(argv)
    sizes = {"frames": (49, 81), "height": (320, 480), "width": (512, 832), "steps": (4, 30)}
    for name, defaults in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[bool(args.model)])
    if args.frames % 4 != 1 or args.height % 16 or args.width % 16:
        parser.error("--frames must be 4 n + 1, --height and --width multiples of 16")
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one compiles")
    return args


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
        return {**shared, "prompt": args.prompt}
    prompt = torch.randn(1, TEXT_TOKENS, WIDTHS["text_dim"], generator=torch.Generator().manual_seed(args.seed))
    embeds = prompt.to(pipe.device, pipe.transformer.dtype)
    return {**shared, "prompt_embeds": embeds, "guidance_scale": 1.0}


def generate(pipe: WanPipeline, arguments: dict[str, Any], seed: int) -> tuple[torch.Tensor, list[float]]:
    """Latents [1, channels, frames, height, width] of one run and the seconds of each step."""
    ends = []

    def note_time(pipe: WanPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return tensors

    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every machine
    start = time.perf_counter()
    latents = pipe(**arguments, generator=generator, callback_on_step_end=note_time).frames
    return latents, [end - begin for begin, end in zip([start, *ends], ends, strict=False)]


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


def main(argv: list[str] | None = None) -> None:
    """Run both variants, print report and times, write the files."""
    args = parse(argv)
    if args.model:
        pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(args.device)
    else:
        pipe = random_pipeline(args.layers, args.device, args.seed)
    transformer = pipe.transformer
    arguments = call_arguments(pipe, args)
    tokens = ((args.frames - 1) // 4 + 1) * (args.height // 16) * (args.width // 16)
    print(f"{args.frames} frames of {args.width}x{args.height}: {tokens:,} video tokens, on {args.device}\n")

    variants = {
        "dense": torch.compile(transformer),
        "sparse": torch.compile(transformer, backend="dynamicrad", options={"sparsity": args.sparsity}),
    }
    latents, seconds = {}, {}
    for name, compiled in variants.items():
        print(f"{name}: {args.steps} steps, the first one compiles")
        pipe.transformer = compiled
        latents[name], seconds[name] = generate(pipe, arguments, args.seed)
    report = drad.report(variants["sparse"])

    print(f"\n{report}\n")
    warm = {name: min(times[1:]) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"{name:7s} first step {times[0]:6.1f} s (with compilation)   then {warm[name]:7.2f} s (the fastest)")
    print(f"        {warm['dense'] / warm['sparse']:.2f}x faster a step")
    error = (latents["sparse"] - latents["dense"]).float().norm() / latents["dense"].float().norm()
    print(f"\nrelative difference of the latents: {error:.4f}")
    if not args.model:
        print("With random weights this figure says nothing about quality; use --model to judge that.")

    print("\ndecoding ...")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    videos = decode(pipe, torch.cat([latents["dense"], latents["sparse"]]))
    save_side_by_side(*videos, args.output_dir / "comparison.webp")
    report.to_html(args.output_dir / "report.html")
    written = ["comparison.webp", "report.html"]
    if report.replaced:
        site = report.replaced[0]
        assert site.plan is not None
        assert site.grid is not None
        boundaries = frame_boundaries(site.grid, site.text_tokens.before)
        plot_mask(site.plan, args.output_dir / "mask.png", title=site.path, boundaries=boundaries)
        written.append("mask.png")
    print("wrote", ", ".join(str(args.output_dir / name) for name in written))


if __name__ == "__main__":
    main()
