"""Time to the first output of a compiled model in a fresh process, caches cold and warm, beside stock Inductor.

    python benchmarks/warm_start.py [--layers 6] [--repeats 3]

Each figure is a process of its own, from torch.compile (with what it imports) to the first output; loading the model is
not counted. Cold: an empty cache folder; warm: that of the cold run. Prints both sides, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

SIDES = {"inductor": None, "dynamicrad": {"min_tokens": 0, "block_size": 64, "sparsity": 0.6, "dense_steps": 1}}


def first_call(side: str, layers: int) -> float:
    """Seconds of the first call of a Wan transformer of width 192 over 9 x 12 x 16 tokens."""
    import time

    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=48, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=384, num_layers=layers, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 16, 9, 24, 32),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 16, 64),
    )
    start = time.perf_counter()
    compiled = torch.compile(model, backend=side, options=SIDES[side])
    with torch.no_grad():
        compiled(**inputs)
    return time.perf_counter() - start


def in_a_process(side: str, layers: int, caches: str) -> float:
    """`first_call` in a fresh process with a folder for PyTorch's caches."""
    command = [sys.executable, __file__, "--child", side, "--layers", str(layers)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(first_call(arguments.child, arguments.layers)))
        return
    import torch

    print(f"{arguments.layers} layers, {platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}")
    warm: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            seconds = in_a_process(side, arguments.layers, os.path.join(folder, side))
            print(f"{side:11s} cold {seconds:6.1f} s", flush=True)
        for _ in range(arguments.repeats):
            for side, runs in warm.items():
                runs.append(in_a_process(side, arguments.layers, os.path.join(folder, side)))
                print(f"{side:11s} warm {runs[-1]:6.1f} s", flush=True)
    medians = {side: statistics.median(runs) for side, runs in warm.items()}
    print(f"warm start, medians: {medians['dynamicrad'] / medians['inductor']:.2f} x stock")


if __name__ == "__main__":
    main()
