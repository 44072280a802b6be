"""What sparse attention does to a model that is really trained: the figures of docs/quality.md.

    python benchmarks/quality.py --checkpoint examples/tiny_video/checkpoint       # half an hour of one core

Stages (--stage, all by default), each resumable: what is in --output is not made again.

    tune      profiles for this grid by `drad.tune`, with and without compensation
    captured  (a), (c), (d) attention error on captured queries, keys and values
    heads     (e) what compensation does to attention, by regime and kind of head
    compensation  (e) what it does to clips, by regime, kind of head, steps and weight
    methods   (a) clips of all methods at equal sparsity of the whole run
    proxy     (b) rank correlation of the proxies' error with attention error; proxy_clips also with video error
    routing   (c) routed regimes against one fixed regime
    dense     (d) first steps and layers that stay dense

Results: benchmarks/results/quality.json and .md, pictures in docs/images/quality_*.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import quality_bench as sizes
import quality_compensation
import quality_proxy
import quality_stages as stages
import torch
from quality_page import page
from tqdm import tqdm

from dynamicrad_compile.quality.harness import write_json

HERE = Path(__file__).resolve().parent

RESULTS = HERE / "results"
IMAGES = HERE.parent / "docs" / "images"
STAGES = {
    "tune": sizes.tune,
    "captured": stages.captured,
    "heads": stages.heads,
    "compensation": quality_compensation.compensation,
    "proxy": quality_proxy.proxy,
    "methods": stages.methods,
    "proxy_clips": quality_proxy.proxy_clips,
    "routing": stages.routing,
    "dense": stages.dense,
}


def main(argv: list[str] | None = None) -> dict:
    """Run the stages; returns what is written to quality.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE.parent / "examples" / "tiny_video" / "checkpoint")
    parser.add_argument("--output", type=Path, default=Path("outputs/quality"), help="what can be made again")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a clip (10)")
    parser.add_argument("--quick", action="store_true", help="very few clips and settings, to try the script")
    args = parser.parse_args(argv)
    if args.quick:
        for name, small in sizes.QUICK.items():
            setattr(sizes, name, small)
    bench = sizes.Bench(args.checkpoint, args.output, args.steps)
    file = RESULTS / "quality.json" if not args.quick else args.output / "quality.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    found["subject"] = bench.about()
    images = args.output if args.quick else IMAGES
    for name in tqdm(args.stage, desc="stages", unit="stage"):
        found[name] = STAGES[name](bench, images)
        write_json(file, found)
        file.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(page(found))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
