"""What the passes add to a compilation: their share of the time to the first result, one fresh process a case.

    OMP_NUM_THREADS=1 python benchmarks/pass_time.py [--layers 2 8 20]

A Wan of tiny widths with so many layers is compiled by name, for Inductor without its caches. Each line: layers,
seconds from the first call to its result, those of the passes and of the plans among them, and their share.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

HEADER = "| layers | first call s | passes s | plans s | share |\n|---|---|---|---|---|"


def measure(layers: int) -> dict[str, float]:
    """Compile a Wan with `layers` layers in this process; times in seconds."""
    import torch
    from diffusers import WanTransformer3DModel

    import dynamicrad_compile as drad

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=64, num_layers=layers,
    ).eval()  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 4, 5, 12, 16), timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 7, 16), return_dict=False,
    )  # fmt: skip
    compiled = torch.compile(model, backend="dynamicrad", options={"min_tokens": 0})
    start = time.perf_counter()
    with torch.no_grad():
        compiled(**inputs)
    total = time.perf_counter() - start
    seconds = drad.report(compiled).seconds
    return {"total": total, "passes": seconds["passes"], "plans": seconds["plans"]}


def main() -> None:
    """Run every case in a child process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 20])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one)))
        return
    print(HEADER, flush=True)
    without_caches = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    for layers in args.layers:
        command = [sys.executable, __file__, "--one", str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=without_caches)
        row = json.loads(done.stdout.splitlines()[-1])
        share = (row["passes"] + row["plans"]) / row["total"]
        print(f"| {layers} | {row['total']:.1f} | {row['passes']:.2f} | {row['plans']:.2f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
