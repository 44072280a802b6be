"""Wan on several GPUs by diffusers' context parallelism: a few denoising steps dense and sparse, in one run.

    torchrun --nproc-per-node 8 examples/multi_gpu.py --ulysses 8 --layers 30              random weights, for times
    torchrun --nproc-per-node 8 examples/multi_gpu.py --ulysses 4 --ring 2 --model FOLDER  a Wan pipeline of diffusers
    torchrun --nproc-per-node 2 examples/multi_gpu.py --ulysses 2 --small                  on the CPU, through gloo

Process 0 prints what was replaced, milliseconds a step of both, and how far apart the results are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import dynamicrad_compile as drad

WIDTHS = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "text_dim": 4096}  # Wan2.1-14B
SMALL = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 512, "text_dim": 64}


def main() -> None:
    """Run the example in this process."""
    args = arguments()
    on_gpu = torch.cuda.is_available() and not args.small
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo the number of accelerators
    # A process that dies is an error on the others after this time at the latest, not a hang.
    timeout = datetime.timedelta(minutes=10)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    if args.ulysses * args.ring != world:
        raise SystemExit(f"--ulysses {args.ulysses} x --ring {args.ring} must be the number of processes, {world}.")

    model = transformer(args, device)
    if args.ring > 1:
        model.set_attention_backend(args.attention)  # rings need the log-sum-exp, which the native backend has not
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=args.ulysses, ring_degree=args.ring))
    inputs = call_inputs(model, args, device)
    results, times = {}, {}
    for name, compiled in {
        "dense": torch.compile(model),
        "sparse": drad.compile(model, sparsity=args.sparsity, min_tokens=0 if args.small else "auto"),
    }.items():
        torch._dynamo.reset()
        denoise(model, inputs, 1)  # diffusers' hooks look their arguments up at the first call
        denoise(compiled, inputs, args.steps)  # compiles
        start = time.perf_counter()
        results[name] = denoise(compiled, inputs, args.steps)
        if on_gpu:
            torch.cuda.synchronize()
        times[name] = (time.perf_counter() - start) / args.steps
    if rank == 0:
        print(drad.report(compiled))
        error = (results["sparse"] - results["dense"]).float().norm() / results["dense"].float().norm()
        dense, sparse = times["dense"], times["sparse"]
        print(
            f"\n{world} x {torch.cuda.get_device_name() if on_gpu else 'CPU processes'}, torch {torch.__version__}, "
            f"ulysses {args.ulysses} x ring {args.ring}, {args.steps} steps\n"
            f"dense {dense * 1e3:.0f} ms a step, sparse {sparse * 1e3:.0f} ms ({dense / sparse:.2f}x); "
            f"relative difference of the latents {error:.4f}" + ("" if args.model else " (random weights)")
        )
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Wan pipeline of diffusers (random weights at the widths of Wan 14B)")
    parser.add_argument("--ulysses", type=int, default=1, help="processes among which heads are exchanged (1)")
    parser.add_argument("--ring", type=int, default=1, help="processes that gather keys and values (1)")
    parser.add_argument("--attention", default="_native_cudnn", help="diffusers' attention backend with a ring")
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of attention that is skipped (0.8)")
    parser.add_argument("--layers", type=int, default=4, help="of the random model (4)")
    parser.add_argument("--frames", type=int, default=21, help="latent frames (21)")
    parser.add_argument("--height", type=int, default=60, help="of the latents (60)")
    parser.add_argument("--width", type=int, default=104, help="of the latents (104)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (4)")
    parser.add_argument("--small", action="store_true", help="a narrow model and a short clip, on the CPU")
    args = parser.parse_args()
    if args.small:
        args.frames, args.height, args.width = 8, 32, 32
    return args


def transformer(args: argparse.Namespace, device: torch.device) -> WanTransformer3DModel:
    """The model, the same on every process."""
    torch.manual_seed(0)
    if args.model:
        model = WanTransformer3DModel.from_pretrained(args.model, subfolder="transformer", torch_dtype=torch.bfloat16)
        return model.to(device).eval()
    model = WanTransformer3DModel(**(SMALL if args.small else WIDTHS), num_layers=args.layers)
    return model.to(device, torch.float32 if args.small else torch.bfloat16).eval()


def call_inputs(model: WanTransformer3DModel, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Noise and a random prompt; with a checkpoint take its pipeline and hand it the compiled transformer instead."""
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "hidden_states": (1, model.config.in_channels, args.frames, args.height, args.width),
        "encoder_hidden_states": (1, 512, model.config.text_dim),
    }
    return {name: torch.randn(size, generator=generator).to(device, model.dtype) for name, size in sizes.items()}


@torch.no_grad()
def denoise(model: Callable[..., Any], inputs: dict[str, Any], steps: int) -> torch.Tensor:
    """Latents after so many steps of flow matching."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps, device=inputs["hidden_states"].device)
    latents = inputs["hidden_states"]
    for timestep in scheduler.timesteps:
        given = {**inputs, "hidden_states": latents, "timestep": timestep.expand(1)}
        velocity = model(**given, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


if __name__ == "__main__":
    main()
