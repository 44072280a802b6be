"""docs/one_attention.md: one attention from Dynamo's graph to the kernel, by the backend's dump of a small model."""

from __future__ import annotations

import inspect
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import dynamicrad_compile as drad
from dynamicrad_compile.passes import PASSES

PAGE = Path(__file__).parents[1] / "one_attention.md"


class TinyDiT(nn.Module):
    """Patches of a video, one attention over all of them, and the way back."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, latents):
        x = self.patch(latents).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


OPTIONS = {"sparsity": 0.6, "mode": "static_ratio", "box": "raster", "compensate": 0.0, "block_size": 16}
"""The plainest method: blocks by place, in raster order, nothing for dropped ones."""

TEXT = """# One attention, followed

<!-- written by docs/scripts/generate.py; change docs/scripts/attention_page.py, not this -->

What happens to one attention, from Dynamo's graph to the kernel, by the backend's own [dump](dump.md). The model is as
small as can be, and the method the plainest: blocks by place, nothing for those that are dropped.

```python
import torch
import torch.nn.functional as F
from torch import nn

import dynamicrad_compile as drad


{model}


options = {options}
report = drad.explain(TinyDiT(), torch.randn(1, 3, 6, 16, 20), options={{**options, "min_tokens": 0, "dump": "folder"}})
```

## What Dynamo captured

A graph of PyTorch's operators. The module has become its weights, and nothing says any more that 480 tokens are 6
frames of 8 x 10 (`0_captured.txt`, long names shortened):

```text
{captured}
```

## What the passes find

Each pass leaves its part at the attention (the lines `# >>> site 0` of each file):

{found}

So the axes come from the sizes of the latents: the trace follows every operator from the inputs on, and knows of each
dimension which axes of the input it holds, in which order. That is how a grid is told from a number of tokens.

## The plan

480 tokens in blocks of 16 are 30 rows of 30 blocks. A row says how many blocks of keys a block of queries reads, and
which. Here are the first five counts and the first row's ids, and a picture, `#` for a block that is read:

```python
plan = drad.make_plan("dynamicrad", grid=(6, 8, 10), **{plan_options})
print(plan.kv_counts[0, 0, :5].tolist(), plan.kv_indices[0, 0, 0, :8].tolist())
print(f"{{plan.sparsity:.1%}}")
```

```text
{numbers}

{mask}
```

## What is handed to Inductor

The counts and ids are buffers of the graph, and one operator reads them in the attention's place. All else is as it
came (`8_replace_attention.txt`, from the values on):

```text
{replaced}
```

## In the kernel

`dynamicrad::block_sparse_attention` is an operator of PyTorch with a kernel for each device. For each block of queries
of each head

1. it reads the count, and that many ids of the row;
2. for each id it takes one block of keys and values, and computes the scores of 16 x 16 pairs;
3. it carries the sum of the softmax, and the output so far, from block to block, as FlashAttention does; a block that
   is not listed is never touched;
4. it divides by the sum and writes 16 rows of the output.

So its time goes with the number of listed blocks, {active} of 900 here. On a GPU a program of Triton does this for one
block of queries of one head (`kernels/attention_triton_kernels.py`); on a CPU rows with as many blocks are gathered
into batched products (`kernels/attention_cpu.py`). `kernels/attention_reference.py` says the same slowly, and every
test compares with it.
"""


def page() -> str:
    """The page for what the backend does to the model now."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        options = {**OPTIONS, "min_tokens": 0, "dump": folder}
        report = drad.explain(TinyDiT(), torch.randn(1, 3, 6, 16, 20), options=options)
        (site,) = report.sites
        files = sorted(Path(report.dumps[0]).glob("*.txt"))
        dumps = {file.stem.partition("_")[2]: file.read_text(encoding="utf-8") for file in files}
    plan_options = {name: value for name, value in OPTIONS.items() if name not in ("mode", "box")}
    plan = drad.make_plan("dynamicrad", grid=site.grid, **plan_options)
    replaced = _lines(dumps["replace_attention"])
    numbers = f"{plan.kv_counts[0, 0, :5].tolist()} {plan.kv_indices[0, 0, 0, :8].tolist()}\n{plan.sparsity:.1%}"
    return TEXT.format(
        model=inspect.getsource(TinyDiT).rstrip(),
        options=_quoted(OPTIONS),
        plan_options=_quoted(plan_options),
        captured=_lines(dumps["captured"]),
        found=_found(dumps),
        numbers=numbers,
        mask="\n".join("".join(".#"[int(read)] for read in row) for row in plan.block_mask()[0, 0]),
        replaced=replaced[replaced.index("v: ") :],
        active=int(plan.kv_counts.sum()),
    )


def _quoted(options: dict[str, object]) -> str:
    return repr(options).replace("'", '"')


def _found(dumps: dict[str, str]) -> str:
    """A list of the passes, with what each one newly says of the site."""
    lines, last = [], ""
    for step in PASSES:
        marks = re.findall(r"^# >>> site 0: (.*)$", dumps.get(step.__name__, ""), re.MULTILINE)
        text = marks[0] if marks else ""
        new = [piece for piece in text.replace(", keys", "; keys").split("; ") if piece and piece not in last]
        if new:
            lines.append(f"- `{step.__name__}`: {new[0]}" + "".join(f";\n  {piece}" for piece in new[1:]))
        last += text
    return "\n".join(lines)


def _lines(dump: str) -> str:
    """The nodes of a graph from its first operator on, with short names."""
    body = dump[dump.index("conv3d") :]
    body = (
        re.sub(r"l_self_modules_(\w+?)_parameters_(\w+?)_\b", r"\1.\2", body)
        .replace("torch._C._nn.", "")
        .replace("l_latents_", "latents")
    )
    body = re.sub(r"_dynamicrad_plan_(\w+)_0 = .*", r"\1 = self._dynamicrad_plan_\1_0", body)
    body = re.sub(r"_dynamicrad_plan_(\w+)_0(?=[,)])", r"\1", body)
    body = body.replace("dynamicrad.block_sparse_attention.default", "dynamicrad.block_sparse_attention")
    return "\n".join(line for line in body.splitlines() if line.strip() and not re.match(r"# (?!>>>)", line))
