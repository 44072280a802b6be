"""Make the checkpoint that is kept in the repository from the folder of a training run.

    python -m examples.tiny_video.ship --run runs/tiny

Writes to the package's quality/tiny_video/checkpoint/ (or --output): model.safetensors (averaged weights, float16),
config.json (with steps, hours, held-out loss), README.md (the model card, from card.md), loss.png, samples.png and
samples.gif. The samples are of held-out captions that nobody chose: the first ones of each regime.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from dynamicrad_compile.files import write_file
from dynamicrad_compile.quality.tiny_video import data, model

from . import pictures, train

LIMIT = 20e6  # bytes of the weights

CARD = Path(__file__).with_name("card.md")


def facts(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the model card that are in the log of a run."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row and row["step"] <= config["step"]]
    if not rows:
        raise ValueError(f"{run / 'log.jsonl'} has no training loss up to step {config['step']}.")
    return {
        "loss": sum(row["loss"] for row in rows[-10:]) / len(rows[-10:]),
        "mean_of": len(rows[-10:]) * train.LOG_STEPS,
    }


def ship(run: Path, output: Path, machine: str, samples: int = 3, began: str = "random weights") -> dict[str, Any]:
    """Write everything to `output`; returns what config.json says. ValueError if the weights are too large.

    samples: clips of each regime; began: the weights that the run began with.
    """
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    pixels = config.get("size", data.SIZE)
    weights = {key: value.half() for key, value in load_file(run / "ema_latest.safetensors").items()}
    size = sum(2 * value.numel() for value in weights.values())
    if size > LIMIT:
        raise ValueError(f"the weights have {size / 1e6:.1f} MB, the repository takes {LIMIT / 1e6:.0f}.")
    model.save(output / "model.safetensors", weights, config)
    transformer, text = model.load(output)
    config["held_out"] = {
        "loss": round(train.held_out_loss(transformer, text, size=pixels).mean().item(), 6),
        "clips": train.HELD_OUT,
        "frames": data.FRAMES,
        "seed": data.HELD_OUT_SEED,
    }
    config["machine"] = machine
    write_file(output / "config.json", json.dumps(config, indent=1) + "\n")

    captions = [caption for regime in data.REGIMES for caption in data.captions(samples, regime=regime)]
    videos = model.sample(transformer, text, captions, progress=tqdm, size=(pixels, pixels))
    pictures.contact_sheet(videos, captions, output / "samples.png")
    pictures.comparison({"samples": videos}, captions, output / "samples.gif", scale=max(1, 96 // pixels))
    numbers = facts(run, config)
    log = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    pictures.loss_curve([json.loads(line) for line in log], output / "loss.png")
    card = CARD.read_text(encoding="utf-8").format(
        **numbers,
        parameters=sum(value.numel() for value in weights.values()) / 1e6,
        seed=train.SEED,
        steps=config["step"],
        clips=config["clips"],
        parts=", ".join(str(data.FRAMES // part) for part in sorted(set(train.TURNS), reverse=True)),
        hours=config["hours"],
        machine=machine,
        held_out=config["held_out"]["loss"],
        long=data.FRAMES,
        held_out_clips=train.HELD_OUT,
        held_out_seed=data.HELD_OUT_SEED,
        shift=model.SHIFT,
        sample_steps=model.STEPS,
        guidance=model.GUIDANCE,
        samples=len(captions),
        words=len(config["vocabulary"]),
        size=pixels,
        tokens=data.FRAMES * (pixels // 4) ** 2,
        began=began,
        folder=output.name,
    )
    write_file(output / "README.md", card)
    return config


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="--output of the training")
    parser.add_argument("--output", type=Path, default=model.CHECKPOINT)
    parser.add_argument("--samples", type=int, default=3, help="clips of each regime (3)")
    parser.add_argument("--began", default="random weights", help="the weights that the run began with, for the card")
    parser.add_argument(
        "--machine", default="one core of an AMD EPYC (AVX2)", help="what it was trained on, for the card"
    )
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        parser.error(f"--run: there is no folder {args.run}")
    torch.set_grad_enabled(False)
    config = ship(args.run, args.output, args.machine, args.samples, args.began)
    print(f"step {config['step']}, held-out loss {config['held_out']['loss']}: written to {args.output}")


if __name__ == "__main__":
    main()
