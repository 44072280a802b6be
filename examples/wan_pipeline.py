"""Text-to-video with a Wan checkpoint on a GPU: block-sparse beside dense, with offloading and LoRAs.

    python examples/wan_pipeline.py                                       # Wan-AI/Wan2.1-T2V-1.3B-Diffusers, 81 frames
    python examples/wan_pipeline.py --model FOLDER --no-dense --steps 50  # block-sparse alone
    python examples/wan_pipeline.py --offload                             # a part of the pipeline on the GPU at a time
    python examples/wan_pipeline.py --offload blocks                      # one block of the transformer at a time
    python examples/wan_pipeline.py --lora STYLE.safetensors OTHER.safetensors   # the second is swapped in

Says first, from the configuration alone, which attentions will be replaced; then runs the pipeline with its transformer
compiled by Inductor and by the backend, and prints the time of a step, compilation apart. Each further LoRA takes the
place of the first in the model that is compiled already. Of the two transformers of Wan 2.2 the first one gets it.

Writes to --output-dir: comparison.webp (the clips side by side), report.html, mask.png (which blocks are read).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import dynamicrad_compile as drad
from dynamicrad_compile.beforehand import output_file, pipeline_class, usable_device
from dynamicrad_compile.cli.values import key_value
from dynamicrad_compile.errors import DynamicRadError
from dynamicrad_compile.models.fake import build
from dynamicrad_compile.optional import optional
from dynamicrad_compile.reporting.plot import frame_boundaries, plot_mask

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PROMPT = "A cat surfs a wave at sunset"
FILES = ["comparison.webp", "report.html", "mask.png"]
ADAPTER = "example"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; what would stop the run later stops it here."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MODEL, help=f"folder or hub id of a WanPipeline ({MODEL})")
    parser.add_argument("--prompt", default=PROMPT, help=f"({PROMPT})")
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of dense attention to skip (0.8)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="options", help="other options")
    parser.add_argument("--frames", type=int, default=81, help="4 n + 1 (81)")
    parser.add_argument("--height", type=int, default=480, help="pixels (480)")
    parser.add_argument("--width", type=int, default=832, help="pixels (832)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps, at least 2 (30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-dense", action="store_true", help="block-sparse alone, without the dense run")
    parser.add_argument(
        "--offload",
        nargs="?",
        const="model",
        choices=["model", "blocks"],
        help="keep weights on the CPU: all but the part that runs (model), or but the block that runs (blocks)",
    )
    parser.add_argument("--lora", nargs="+", type=Path, default=[], metavar="FILE", help=".safetensors of one or more")
    parser.add_argument("--device", default="cuda", help="cuda; cpu takes hours with a real checkpoint")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args(argv)
    try:
        check(args)
    except DynamicRadError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raises DynamicRadError for what would stop the run at its end, or before its first step."""
    args.options = {"sparsity": args.sparsity, **dict(key_value(text) for text in args.options)}
    drad.Options(**args.options)
    if args.steps < 2:
        raise DynamicRadError(f"--steps must be at least 2, got {args.steps}: the first one compiles.")
    if args.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise DynamicRadError(
            "there is no GPU here; --device cpu runs on the CPU, for which a real checkpoint is slow."
        )
    usable_device(args.device)
    optional("PIL", "pictures need", "plot")
    optional("diffusers", "Wan pipelines need", "diffusers")
    if args.offload:
        optional("accelerate", "--offload needs", "diffusers")
    if args.lora:
        optional("peft", "--lora needs", "lora")
        args.rank = max(map(rank_of, args.lora))
    for name in FILES:
        output_file(args.output_dir / name)


def rank_of(file: Path) -> int:
    """The largest rank in a LoRA's file. Raises DynamicRadError if it is no such file."""
    safetensors = optional("safetensors", "--lora needs", "lora")
    if not file.is_file():
        raise DynamicRadError(f"--lora {file}: there is no such file.")
    try:
        with safetensors.safe_open(file, "pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise DynamicRadError(f"--lora {file} is not a safetensors file: {error}.") from None
    ranks = [shape[0] for key, shape in shapes.items() if "lora_A" in key or "lora_down" in key]
    if not ranks:
        raise DynamicRadError(f"--lora {file} has no LoRA: none of its {len(shapes)} tensors is a lora_A or lora_down.")
    return max(ranks)


def explain(args: argparse.Namespace) -> None:
    """Print what will be replaced, from the configuration: two layers without weights, captured on the CPU."""
    path = args.model
    if Path(path).is_dir():
        pipeline_class(path, "Wan pipelines need")
    else:
        hub = optional("huggingface_hub", "models of the hub need", "diffusers")
        try:
            path = hub.hf_hub_download(path, "transformer/config.json")
            hub.hf_hub_download(args.model, "vae/config.json")
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise DynamicRadError(
                f"--model {args.model} is no folder, and not to be had from the hub: {first}"
            ) from None
    model, inputs = build(path, frames=args.frames, height=args.height, width=args.width)
    if type(model).__name__ != "WanTransformer3DModel":
        raise DynamicRadError(f"--model {args.model} has a {type(model).__name__}; this example is for WanPipeline.")
    print("Before the run, from two layers of the configuration:\n")
    print(drad.explain(model, options=args.options, **inputs), "\n")


class Forward:
    """What stands in a module's `forward`: one of several compiled ones, so that offloading's hooks stay outside."""

    def __init__(self, module: torch.nn.Module, options: dict[str, Any]) -> None:
        plain = module.forward
        self.compiled: dict[str, Callable[..., Any]] = {
            "dense": torch.compile(plain, backend=options.get("inner", "inductor")),
            "sparse": drad.compile(plain, **options),
        }
        self.now, self.began = "sparse", 0.0
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.began = self.began or time.perf_counter()
        return self.compiled[self.now](*args, **kwargs)


class Wan:
    """A WanPipeline with compiled transformers (Wan 2.2 has two)."""

    def __init__(self, args: argparse.Namespace) -> None:
        import diffusers

        self.args = args
        dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
        types = {"default": dtype, "vae": torch.float32}
        try:
            self.pipe = diffusers.WanPipeline.from_pretrained(args.model, torch_dtype=types)
        except (OSError, ValueError) as error:
            raise DynamicRadError(f"--model {args.model}: no WanPipeline can be loaded there: {error}") from None
        parts = (self.pipe.transformer, getattr(self.pipe, "transformer_2", None))
        self.transformers = [part for part in parts if part is not None]
        if len(args.lora) > 1:  # room for the largest; before the first is loaded and anything is compiled
            for transformer in self.transformers:
                transformer.enable_lora_hotswap(target_rank=args.rank, check_compiled="ignore")
        if args.lora:
            self.load_lora(args.lora[0])
        self.forwards = [Forward(transformer, args.options) for transformer in self.transformers]
        self.place()

    def place(self) -> None:
        """Move the pipeline to the device, or set up offloading."""
        device = self.args.device
        if self.args.offload == "model":
            self.pipe.enable_model_cpu_offload(device=device)
        elif self.args.offload == "blocks":
            from diffusers.hooks import apply_group_offloading

            to = {"onload_device": torch.device(device), "use_stream": device.startswith("cuda")}
            for transformer in self.transformers:
                transformer.enable_group_offload(**to, offload_type="block_level", num_blocks_per_group=1)
            apply_group_offloading(self.pipe.text_encoder, **to, offload_type="leaf_level")
            self.pipe.vae.to(device)
        else:
            self.pipe.to(device)

    def load_lora(self, file: Path, swap: bool = False) -> None:
        """Load a LoRA, or let it take the place of the one that is loaded."""
        try:
            self.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER, hotswap=swap)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise DynamicRadError(f"--lora {file} does not fit this model: {error}") from None

    def generate(self, which: str) -> tuple[torch.Tensor, list[float]]:
        """A clip [1, 3, frames, height, width] in -1..1 and the seconds of each step, text and decoder apart."""
        for forward in self.forwards:
            forward.now, forward.began = which, 0.0
        ends: list[float] = []

        def note_time(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            return tensors

        args = self.args
        generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same noise on every machine
        size = {"num_frames": args.frames, "height": args.height, "width": args.width}
        video = self.pipe(
            args.prompt, **size, num_inference_steps=args.steps, generator=generator, output_type="pt",
            callback_on_step_end=note_time,
        ).frames  # fmt: skip
        began = min(forward.began for forward in self.forwards if forward.began)
        return video.float().cpu().transpose(1, 2) * 2 - 1, [end - start for start, end in pairwise([began, *ends])]

    def report(self) -> drad.Report:
        """What the backend did, in all transformers."""
        reports = [drad.report(forward.compiled["sparse"]) for forward in self.forwards]
        return drad.Report([graph for report in reports for graph in report.graphs], reports[0].why_empty)


def run(wan: Wan) -> dict[str, torch.Tensor]:
    """All clips by name, times printed as they come: dense, sparse, and sparse with each further LoRA."""
    args, clips, medians = wan.args, {}, {}
    variants = [("dense", "dense", None)] * (not args.no_dense) + [("sparse", "sparse", None)]
    variants += [(f"sparse, {file.stem}", "sparse", file) for file in args.lora[1:]]
    for name, which, lora in variants:
        if lora is not None:
            before = len(wan.report().graphs)
            wan.load_lora(lora, swap=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        print(f"{name}: {args.steps} steps ...", flush=True)
        clips[name], seconds = wan.generate(which)
        medians[name] = statistics.median(seconds[1:])
        memory = f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if args.device.startswith("cuda") else ""
        compiles = "" if lora else " (compiles)"
        print(f"  first step {seconds[0]:.2f} s{compiles}, then {medians[name]:.3f} s a step, the median{memory}")
        if lora is not None:
            print(f"  {len(wan.report().graphs) - before} graphs were compiled for this LoRA")
    if not args.no_dense:
        error = (clips["sparse"] - clips["dense"]).square().mean()
        print(f"\n{medians['dense'] / medians['sparse']:.2f}x the speed of dense, a step")
        print(f"{10 * torch.log10(4 / error):.1f} dB between the two clips (PSNR; from 30 dB on it is hard to see)")
    return clips


def write(clips: dict[str, torch.Tensor], report: drad.Report, args: argparse.Namespace) -> None:
    """Write the clips side by side, the report, and the mask of the first attention that was replaced."""
    from tiny_video import pictures

    args.output_dir.mkdir(parents=True, exist_ok=True)
    video, page, mask = written = [args.output_dir / name for name in FILES]
    pictures.comparison(clips, [args.prompt], video, scale=1, fps=16)
    report.to_html(page)
    site = next(iter(report.replaced), None)
    if site is not None and site.plan is not None and site.grid is not None:
        plot_mask(
            site.plan, mask, title=site.path, boundaries=frame_boundaries(site.grid, site.text_tokens.before or 0)
        )
    else:
        written.remove(mask)
    print("\nwrote", ", ".join(map(str, written)))


def main(argv: list[str] | None = None) -> None:
    """Explain, load, run, report, write."""
    args = parse(argv)
    try:
        explain(args)
        wan = Wan(args)
        clips = run(wan)
    except DynamicRadError as error:
        raise SystemExit(f"error: {error}") from None
    report = wan.report()
    print(f"\n{report}")
    write(clips, report, args)


if __name__ == "__main__":
    main()
