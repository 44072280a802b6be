"""What all stages of benchmarks/quality.py share: sizes, the subject, its captured attention, tuned profiles."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import quality_attention as attention
import torch
from tqdm import tqdm

import dynamicrad_compile as drad
from dynamicrad_compile.profiles import REGIMES, Profile
from dynamicrad_compile.quality import make_clips

BLOCK = 16
# Where Radial can be on this grid: a mask of its own, then the published one (0.8789) after 2, 1, 0 dense steps of 10.
POINTS = (0.5117, 0.7031, 0.791, 0.8789)
CLIP_POINTS = (0.791, 0.7031, 0.8789, 0.5117)  # of clips, in this order
CAPTURED_STEPS = (0, 2, 4, 7, 9)
CAPTURED = 6  # prompts, regimes in turn
CLIPS = 9  # per method in (a) and (e), regimes in turn
ROUTED_CLIPS = 12
SETTINGS = 64  # of (b), half of them with compensation
PROXY_CLIPS = 3  # from the second prompt on: mid, high, low
PROXY_STEPS = 4  # of a clip in (b)
DENSE_CLIPS = 3  # as well
RECORDED = 9  # further prompts, on whose attention the profiles are tuned: three a regime, one of them held out
RECORDED_HEADS = 48  # of each
BUDGET = 30
SEEDS = (1, 2)
RESAMPLES = 2000
ROWS = 256  # query rows of the proxies' draws
QUICK = {
    "POINTS": (0.8,), "CLIP_POINTS": (0.8,), "CAPTURED_STEPS": (0, 1), "CAPTURED": 6, "CLIPS": 3, "ROUTED_CLIPS": 3,
    "SETTINGS": 6, "BUDGET": 10, "SEEDS": (1,), "RESAMPLES": 50,
}  # fmt: skip


class Bench:
    """The subject, what was captured of it, and the folder of what can be made again."""

    def __init__(self, checkpoint: Path, folder: Path, steps: int) -> None:
        from dynamicrad_compile.quality.tiny_video import data, model
        from dynamicrad_compile.quality.tiny_video.subject import prompts, subject

        self.subject = subject(checkpoint, steps=steps)
        self.unguided = subject(checkpoint, steps=steps, guidance_scale=1.0)
        self.shorter = subject(checkpoint, steps=min(steps, PROXY_STEPS), guidance_scale=1.0)
        self.text = model.load(checkpoint)[1]
        self.folder, self.steps = folder, steps
        judged = max(CAPTURED, CLIPS, ROUTED_CLIPS)
        self.prompts, self.further = prompts(judged), prompts(judged + RECORDED)[judged:]
        config = checkpoint / "config.json" if checkpoint.is_dir() else checkpoint.parent / "config.json"
        self.training = {k: v for k, v in json.loads(config.read_text()).items() if isinstance(v, (int, float, str))}
        self.data = data
        self._sites: list[attention.Site] | None = None

    @property
    def sites(self) -> list[attention.Site]:
        """Captured attentions, made at the first use."""
        if self._sites is None:
            steps = [step for step in CAPTURED_STEPS if step < self.steps]
            prompts = self.prompts[:CAPTURED]
            self._sites = attention.capture(self.unguided, prompts, steps, BLOCK, self.folder / "captures")
        return self._sites

    def about(self) -> dict[str, Any]:
        """What the figures are of."""
        machine = {"machine": platform.machine(), "torch": torch.__version__.split("+")[0]}
        return {"name": self.unguided.name, "training": self.training, "block": BLOCK, **machine}

    def profile(self, name: str) -> Profile:
        """A profile that the stage `tune` has made: "tuned" or "plain" (without compensation), or on proxies."""
        return drad.load_profile(self.folder / f"{name}.toml")

    def recorded(self) -> list[Path]:
        """Attention of further prompts and seeds, as anybody would record it."""
        files = []
        for number, prompt in enumerate(tqdm(self.further, desc="recording", unit="clip")):
            regime = REGIMES[number % 3]
            files.append(self.folder / f"recorded-{number}-{regime}.safetensors")
            if not files[-1].is_file():
                grid = self.subject.grid
                model = self.unguided.model
                with drad.record_attention(model, files[-1], grid, regime=regime, heads=RECORDED_HEADS, seed=number):
                    self.unguided.generate(model, [prompt], [100 + number])
        return files

    def clips(
        self, method: Any, count: int, bar: Any = None, subject: Any = None, first: int = 0
    ) -> tuple[torch.Tensor, float]:
        """Clips of `count` prompts from the first on, seed = number of the prompt, and the sparsity of the run."""
        subject = subject or self.subject
        prompts, seeds = self.prompts[first : first + count], range(first, first + count)
        tick = bar.update if bar is not None else lambda n: None
        made, sparsity, _ = make_clips(subject, method, prompts, seeds, self.folder / "clips", 3, tick)
        return made, sparsity


def tune(bench: Bench, images: Path) -> dict[str, Any]:
    """Profiles of this grid, on recorded attention and on the proxies, with and without compensation."""
    losses = {}
    captures = bench.recorded()
    for name, files, given in (
        ("tuned", captures, {}),
        ("plain", captures, {"compensate": 0.0}),
        ("tuned_on_proxies", [], {}),
        ("plain_on_proxies", [], {"compensate": 0.0}),
    ):
        path = bench.folder / f"{name}.toml"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            drad.tune(
                bench.subject.grid, path, block_size=BLOCK, heads=4, head_dim=32, sparsity=0.8, budget=BUDGET,
                seeds=SEEDS, rows=ROWS, fixed=given, header={"min_tokens": 0}, pictures=False, captures=files,
                resume=path.with_suffix(".jsonl").is_file(),
            )  # fmt: skip
        profile = bench.profile(name)
        losses[name] = {"mode": profile.mode, "loss": profile.provenance.loss}
    return losses
