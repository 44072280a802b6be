"""docs/reasons.md: every reason and every warning, with what to do, as the code says them."""

from __future__ import annotations

import textwrap
from pathlib import Path

from reason_texts import OPEN, Said, reasons

PAGE = Path(__file__).parents[1] / "reasons.md"

HEAD = """# Troubleshooting

<!-- written by docs/scripts/generate.py from the source; change that, not this -->

A model that is not sparse says why, at once in a warning, and for each attention in the report:

```python
import torch
import dynamicrad_compile as drad

q = torch.randn(1, 2, 480, 16)
report = drad.explain(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), q)
site = report.sites[0]
print(site.code, "|", site.reason, "|", site.advice)
```

- `dynamicrad explain --model NAME` and `drad.explain(model, ...)` tell it before anything is compiled,
  `drad.report(compiled)` afterwards.
- `TORCH_LOGS="+dynamicrad_compile"` shows a line for every graph, `TORCH_LOGS=graph_breaks` where Dynamo cut the model.
- `options={"dump": "folder"}` writes each graph before and after each pass ([dump](dump.md)).
- `strict=True` makes an error of a video self-attention that stays dense and of a wish that can't be met.

## Warnings and notes

A warning is in the log and in the report, a note in the report alone; `…` stands for what differs from case to case.
"""

REASONS = """## Reasons to stay dense

Each attention that stays dense has a code (`site.code`), a reason (`site.reason`) and advice (`site.advice`), in the
report's JSON and HTML too. Codes keep their meaning from version to version; texts may change.
"""

SECTIONS = {
    "What the sequence is": ("axes", "classify_sites", "decode_positions", "not_video", "buffers", "shard_positions"),
    "How attention is called": ("passes.reading", "find_attention"),
    "How the graph is compiled, and what was asked for": ("replace_attention", "policy"),
}
"""Titles, and what is in the names of the modules whose reasons stand there; the first that fits."""

ERRORS = {
    "grid_contradicted": "the option `grid` is not what the graph shows of this attention, though of another",
    "too_long": "more blocks than a plan may have (10,000)",
    "plan_misfit": "the option `plan` is for another length or number of heads, or its blocks can't be used",
}
"""Reasons whose text is that of an error raised elsewhere."""

SEE = {
    "behind_graph_break": "breaks.md",
    "context_parallel": "several_gpus.md",
    "shard_shows_no_grid": "several_gpus.md#regional-compilation",
    "more_keys": "caches.md",
    "arranged_otherwise": "caches.md",
    "few_frames_ask": "caches.md",
    "mask_differs": "masks.md",
    "mask_groups": "masks.md#groups-of-queries",
    "plan_misfit": "own_mask.md",
    "plan_without_queries": "own_mask.md#the-mask",
    "no_search": "motion.md#pattern-adaspa-an-exact-search",
    "no_gain": "benchmarks.md#the-crossover",
}
"""Where more is said of a reason."""

NOTES = (
    (
        "no attention of this graph was replaced: …",
        "The reason and the advice behind it are those of the first attention; `drad.report` has the others.",
    ),
    (
        "… attention calls ran outside every graph (at …), where nothing can be replaced: …",
        "Dynamo broke the graph, or gave the code up. Do without the offloading or casting hook there, or use one "
        "around whole blocks; `TORCH_LOGS=graph_breaks` tells where.",
    ),
    (
        "… attention calls ran inside an operation of a graph into which nothing can look (at …).",
        "Choose another attention backend of the model: in diffusers `model.set_attention_backend('native')`.",
    ),
    (
        "timesteps jump back and forth: calls of several requests are mixed",
        "Put each request into `with drad.generation():` ([serving](serving.md)).",
    ),
    (
        "… can't be honoured: no timestep among the inputs of this graph; every step is sparse",
        "Compile the whole model, or with `drad.compile(model, ...)`, which notes the timestep beside the graphs.",
    ),
    (
        "refresh_steps = … has no meaning: mode is not dynamic_threshold",
        'Set `mode="dynamic_threshold"`, or leave `refresh_steps` out.',
    ),
    (
        "refresh_steps = … can't be honoured: one compiled function serves all layers; compile the model",
        "Kept blocks belong to a layer: compile the whole model, not its blocks.",
    ),
    (
        "refresh_steps = … can't be honoured: the regimes choose by different criteria",
        "Fix one regime with the option `regime`, or give `sparsity`.",
    ),
    (
        "regime 'auto' is 'high', the safe one: no motion router is given",
        "Nothing must be done. A [router](router.md) lets prompts with less motion skip more.",
    ),
    (
        "regime 'auto' is 'high', the safe one: no prompt embedding was found among the inputs of this graph",
        "Compile with `drad.compile(model, ...)`, which notes the prompt beside the graphs.",
    ),
    (
        "regime 'auto' is 'high', the safe one: the router is for embeddings of … features, the prompt has …",
        "Fit a router to this model's text encoder: `drad.fit_router(pipe)`.",
    ),
    (
        "profile 'auto' is …: …",
        "Nothing must be done: it says which shipped profile was taken and why. The option `profile` names another.",
    ),
    (
        "mode 'auto' is …",
        "Nothing must be done: it says which of the two modes was taken and why. The option `mode` fixes it.",
    ),
    (
        "min_tokens 'auto' is …: …",
        "The crossover table can't be read or has nothing for this device; a number as `min_tokens` sets a limit.",
    ),
    (
        "sparsity changes over a run of … steps",
        "Say with the option `steps` how many steps your scheduler takes, if it is another number.",
    ),
    (
        "pattern … reads the blocks of its first step at every step: no timestep is among the inputs of this graph",
        "Compile with `drad.compile(model, ...)`, which notes the timestep beside the graphs.",
    ),
    (
        "pattern … has no schedule of sparsity: not used",
        'Give a number, or take pattern `"dynamicrad"`.',
    ),
    (
        "no attention of this graph uses the option plan. …",
        "The plan is for another length or another number of heads: see `plan_misfit` below.",
    ),
    (
        "… can't be traced: …",
        "An operation that the passes do not know; what comes of it is in doubt. Please report the model.",
    ),
    (
        "qk_dtype 'int8_dense' does nothing here: no step is dense",
        'Set `dense_steps`, or take `qk_dtype="int8"`.',
    ),
    (
        "no attention was found, but a softmax: was run_decompositions() called?",
        "Rewrite the exported program before it is decomposed.",
    ),
    (
        "TensorRT: no engine could be built, the graph runs in PyTorch: …",
        "See the error; `inner_options={'pass_through_build_failures': True}` raises it ([TensorRT](tensorrt.md)).",
    ),
)
"""Warnings and notes as the code has them, and what to do. A test finds each text in the source."""


def page() -> str:
    """The page for the reasons that the source makes."""
    said = reasons()
    parts = [HEAD, *(_item(f"`{text}`", [advice]) for text, advice in NOTES), "", REASONS]
    for title in SECTIONS:
        parts += [f"### {title}\n", *(_entry(one) for one in said if _section(one) == title), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def _section(one: Said) -> str:
    return next(title for title, pieces in SECTIONS.items() if any(piece in one.module for piece in pieces))


def _entry(one: Said) -> str:
    texts = [text for text in one.texts if text != OPEN and text[0] != ":" and text[-1] != " "] or [ERRORS[one.code]]
    see = f" See [{TITLES[SEE[one.code].partition('.')[0]]}]({SEE[one.code]})." if one.code in SEE else ""
    advice = one.advice[0].rstrip(".").replace("**", "\\*\\*")
    return _item(f"`{one.code}`: {_plain('; or: '.join(texts[:2]))}", [f"{advice}.{see}"])


def _plain(text: str) -> str:
    """Text in which nothing is markup."""
    return text.replace("[", "\\[").replace("*", "\\*").replace(f"{OPEN}{OPEN}", OPEN)


def _item(term: str, lines: list[str]) -> str:
    """An entry of a list: what is said, and beneath it what to do."""
    whole = [f"- {term}", *(f"    - {line[0].upper()}{line[1:]}" for line in lines)]
    return "\n".join(
        piece for line in whole for piece in textwrap.wrap(line, 120, subsequent_indent=_indent(line), **WHOLE)
    )


def _indent(line: str) -> str:
    return " " * (line.index("-") + 2)


WHOLE = {"break_long_words": False, "break_on_hyphens": False}
TITLES = {
    "breaks": "behind a graph break",
    "several_gpus": "several GPUs",
    "caches": "queries among more keys",
    "masks": "masks",
    "own_mask": "your own mask",
    "motion": "motion",
    "benchmarks": "benchmarks",
}
"""What a page is called in a link to it."""
