"""What the backend does to every model of the test zoo, as a Markdown table.

    python benchmarks/zoo_table.py                       # all cases, about ten minutes on one core
    python benchmarks/zoo_table.py wan_t2v helios        # some
    python benchmarks/zoo_table.py --inductor wan_t2v    # with code generation: the share of the passes is then real
    python benchmarks/zoo_table.py --save                # also benchmarks/results/zoo.* and docs/models.md

Columns
    attentions   attention calls in all graphs
    sites        video self-attentions: expected / found / replaced. A model that is left dense says why below the table
    grid         whether all that were replaced have the expected grid, and text before and after
    all blocks   largest relative error of the output, a plan that keeps everything against eager, over all resolutions
    70 %         the same at 70 % of the blocks skipped, against dense attention under the same mask; two resolutions
                 (* left dense at the second, and equal to eager there)
    graphs       graphs captured by the first call
    recompiles   graphs captured by four more resolutions; - where the case has one resolution
    blocks       what compile_repeated_blocks replaces; - where the model has no repeated blocks
    passes       seconds in the graph passes, first call; share of the first call, capture and inner compiler included

A case that fails shows its error and does not stop the run.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import inspect
import json
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import models_page
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from zoo.chunks import allowed_by
from zoo.models import ZOO, out_tensors
from zoo.more import ZOO_MORE
from zoo.original import ZOO_ORIGINAL

import dynamicrad_compile as drad
from dynamicrad_compile.reporting.report import Report

ROOT = Path(__file__).parents[1]

Make = Callable[..., tuple[Any, dict[str, Any], dict[str, Any]]]
CASES: dict[str, Make] = {**ZOO, **ZOO_MORE, **ZOO_ORIGINAL}
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = 16
PLAIN = {"sparsity": 0.7, "compensate": 0.0, "covariance": False, "box": "raster"}
SPARSE = {"profile": "default", "regime": "high", "mode": "static_ratio", **PLAIN}


@dataclass
class Row:
    """One case. Errors are relative L2 norms; None where there is nothing to measure."""

    name: str
    attentions: int = 0
    expected: int = 0
    found: int = 0
    replaced: int = 0
    grid_right: bool | None = None
    full_error: float | None = None
    sparse_error: float | None = None
    graphs: int = 0
    recompiles: int | None = None
    by_blocks: str = ""
    passes: float = 0.0
    share: float = 0.0
    dense_elsewhere: bool = False
    reasons: list[str] = field(default_factory=list)
    failure: str = ""

    def cells(self) -> list[str]:
        """Cells of the table."""
        if self.failure:
            return [self.name, self.failure]
        right = {None: "-", True: "right", False: "WRONG"}[self.grid_right]
        return [
            self.name,
            str(self.attentions),
            f"{self.expected} / {self.found} / {self.replaced}",
            right,
            _error(self.full_error),
            _error(self.sparse_error) + "*" * self.dense_elsewhere,
            str(self.graphs),
            "-" if self.recompiles is None else str(self.recompiles),
            self.by_blocks or "-",
            f"{self.passes:.2f} s",
            f"{self.share:.0%}",
        ]


HEADER = ["model", "attentions", "sites", "grid", "all blocks", "70 %", "graphs", "recompiles", "blocks"]
HEADER += ["passes", "share"]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the cases and print the table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all if none is given")
    parser.add_argument("--inductor", action="store_true", help="compile the rewritten graphs with Inductor")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/zoo.* and docs/models.md")
    options = parser.parse_args(arguments)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; known: {', '.join(CASES)}")
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    rows = []
    for name in options.cases or CASES:
        row = run(name, "inductor" if options.inductor else "eager")
        rows.append(row)
        print(" | ".join(row.cells()), flush=True)
        if options.save:  # after every row: it is long work
            save([row], "Inductor" if options.inductor else "eager")
    print("\n" + table(rows))
    return rows


def save(rows: list[Row], inner: str) -> None:
    """Write the table and the page of models; rows of other cases stay as they were."""
    RESULTS.mkdir(exist_ok=True)
    before = json.loads(models_page.ROWS.read_text(encoding="utf-8"))["rows"] if models_page.ROWS.exists() else []
    known = {row["name"]: Row(**row) for row in before} | {row.name: row for row in rows}
    rows = [known[name] for name in CASES if name in known]
    content = {"version": f"torch {torch.__version__}, diffusers {metadata.version('diffusers')}"}
    content |= {"date": str(datetime.date.today()), "rows": [asdict(row) for row in rows]}
    models_page.ROWS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    models_page.write(content)
    explained = (__doc__ or "").split("Columns\n")[1]
    head = f"torch {torch.__version__}, inner compiler {inner}, {datetime.date.today()}."
    page = f"# The zoo\n\n{head}\n\n```\n{explained}```\n\n{table(rows)}\n"
    (RESULTS / "zoo.md").write_text(page, encoding="utf-8")


def run(name: str, inner: str) -> Row:
    """Measure one case; an error becomes part of the row."""
    row = Row(name)
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            _measure(row, CASES[name], inner)
    except Exception as error:  # one case must not stop the others
        row.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return row


def _measure(row: Row, make: Make, inner: str) -> None:
    common = {"min_tokens": 0, "block_size": BLOCK, "inner": inner}
    model, kwargs, expected = make()
    _wake(model)
    compiled = _compile(model, sparsity=0.0, **common)
    start = time.perf_counter()
    out = _call(compiled, kwargs)
    first = time.perf_counter() - start
    report = drad.report(compiled)
    _read(row, report, expected)
    row.passes = report.seconds.get("passes", 0.0) + report.seconds.get("plans", 0.0)
    row.share = row.passes / first
    if row.replaced:
        row.full_error = _relative(out, _call(model, kwargs))
    row.recompiles = _other_resolutions(row, make, model, compiled)
    if row.replaced == row.expected > 0:  # else the reference would mask what stays dense, too
        row.sparse_error, row.dense_elsewhere = _against_masked_dense(make, common)
    if row.expected:
        row.by_blocks = _by_blocks(make, common)


def _by_blocks(make: Make, common: dict[str, Any]) -> str:
    """What regional compilation replaces, and the error where that is too large; "" without repeated blocks."""
    model, kwargs, _ = make()
    if not getattr(model, "_repeated_blocks", None):
        return ""
    _wake(model)
    wanted = _call(model, kwargs)
    torch._dynamo.reset()
    try:
        model.compile_repeated_blocks(backend="dynamicrad", options={"sparsity": 0.0, **common})
        error = _relative(_call(model, kwargs), wanted)
    except Exception as error:
        return f"fails: {type(error).__name__}"
    if error > 1e-4:
        return f"WRONG: {error:.0e}"
    report = drad.report(model)
    longest = max((site.shape[-2] for site in report.sites if site.shape), default=0)
    whole = [site for site in report.sites if site.shape is None or site.shape[-2] == longest]
    dense = [site for site in whole if not site.replaced and site.role != "cross_attention"]
    if not report.replaced:
        return f"dense: {dense[0].code}" if dense else "dense"
    return "partly: " + dense[0].code if dense else "sparse"


def _against_masked_dense(make: Make, common: dict[str, Any]) -> tuple[float, bool]:
    """Largest error of one compiled model on two resolutions, or on one where the case can't vary.

    Also whether it was dense on another resolution than the first: then eager is the reference there.
    """
    model, _, _ = make()
    _wake(model)
    params = drad.load_profile("default").regime("high").static_ratio.model_dump()
    params |= PLAIN
    compiled = _compile(model, **SPARSE, **common)
    errors: list[float] = []
    dense_elsewhere = False
    for sizes in _resolutions(make)[:2]:
        try:
            _, kwargs, expected = make(**sizes)
            _call(model, kwargs)
        except Exception:  # made for one resolution
            break
        more, before, after = (expected[n] for n in ("kv_extra_before", "n_text_before", "n_text_after"))
        keys = more + before + math.prod(expected["grid"]) + after
        first = more + expected.get("in_cache", 0)
        text = {"text_before": more + before, "text_after": after, "queries": (first, keys)}
        plan = drad.make_plan("dynamicrad", expected["grid"], BLOCK, **text, **params)
        sparse = _call(compiled, kwargs)
        sites = drad.report(compiled).graphs[-1].sites
        chunked = [allowed_by(one) for one in sites if one.chunks]
        with MaskedDense(chunked[0] if chunked else _allowed(plan)):
            error = _relative(sparse, _call(model, kwargs))
        if errors and error > 1e-4 and _relative(sparse, _call(model, kwargs)) < 1e-6:
            error, dense_elsewhere = 0.0, True
        errors.append(error)
    return max(errors), dense_elsewhere


def _allowed(plan: drad.BlockPlan) -> torch.Tensor:
    """bool [queries, keys] of a plan."""
    rows, cols = torch.arange(plan.q_len) // plan.block_q, torch.arange(plan.kv_len) // plan.block_kv
    return plan.block_mask()[0, 0][rows][:, cols]


def _wake(model: torch.nn.Module) -> None:
    """Random numbers for parameters that start at zero: behind a zero gate no attention could be seen to be wrong."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0.0, 0.1)


def _resolutions(make: Make) -> list[dict[str, int]]:
    sizes = {name: p.default for name, p in inspect.signature(make).parameters.items() if name in "fhw"}
    f, h, w = sizes["f"], sizes["h"], sizes["w"]
    return [dict(f=a, h=b, w=c) for a, b, c in ((f, h, w), (f, w, h), (f + 2, h, w), (f + 2, h, w + 8), (f, h + 8, w))]


def _read(row: Row, report: Report, expected: dict[str, Any]) -> None:
    video = [site for site in report.sites if site.role == "video_self_attention"]
    row.attentions, row.graphs = len(report.sites), len(report.graphs)
    row.expected, row.found, row.replaced = expected["n_video_self_attn_nodes"], len(video), len(report.replaced)
    wanted = (expected["grid"], expected["n_text_before"], expected["n_text_after"])
    if report.replaced:
        row.grid_right = row.replaced <= row.expected and all(
            site.grid == wanted[0] and all(a in (None, b) for a, b in zip(site.text_tokens, wanted[1:], strict=True))
            for site in report.replaced
        )
    if row.replaced < row.expected:
        doubtful = [s for s in report.sites if s.role != "cross_attention" and not s.replaced] or report.sites
        longest = max((s.shape[-2] if s.shape else 0 for s in doubtful), default=0)
        dense = [s for s in doubtful if (s.shape[-2] if s.shape else 0) == longest]
        row.reasons = list(dict.fromkeys(site.reason for site in dense if not site.replaced)) or [
            "no attention was captured"
        ]


def _other_resolutions(row: Row, make: Make, model: Any, compiled: Any) -> int | None:
    """Graphs captured by four more resolutions; None where the case can't vary."""
    before = len(drad.report(compiled).graphs)
    for sizes in _resolutions(make)[1:]:
        try:
            _, changed, _ = make(**sizes)
            wanted = _call(model, changed)
        except Exception:  # the case, or its model, is made for one resolution
            return None
        error = _relative(_call(compiled, changed), wanted)
        if row.full_error is not None:
            row.full_error = max(row.full_error, error)
    return len(drad.report(compiled).graphs) - before


def _compile(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="dynamicrad", options=options)


def _call(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """First tensor of the output; inputs are copied, for some models write into their caches."""
    return out_tensors(model(**copy.deepcopy(kwargs)))[0]


def _relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    actual, wanted = actual.double(), wanted.double()
    return ((actual - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


class MaskedDense(TorchFunctionMode):
    """Inside, every self-attention over that sequence is dense attention under a bool mask [queries, keys], too.

    FlexAttention without a mask of its own included; a mode sees nothing of it.
    """

    def __init__(self, allowed: torch.Tensor):
        super().__init__()
        self.flex = flex.flex_attention
        self.allowed = allowed

    def __enter__(self) -> Any:
        flex.flex_attention = self._flex  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        flex.flex_attention = self.flex
        super().__exit__(*error)

    def _flex(self, query: Any, key: Any, value: Any, block_mask: Any = None, **rest: Any) -> Any:
        if (query.shape[-2], key.shape[-2]) != tuple(self.allowed.shape) or block_mask is not None:
            return self.flex(query, key, value, block_mask=block_mask, **rest)
        return F.scaled_dot_product_attention(query, key, value, scale=rest.get("scale"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        shape = tuple(self.allowed.shape)
        if func in (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention):
            query, key = (
                kwargs.get(name, args[i] if len(args) > i else None) for i, name in ((0, "query"), (1, "key"))
            )
            if (query.shape[-2], key.shape[-2]) == shape:
                mask = kwargs.pop("attn_mask", None)
                mask = mask if mask is None or mask.dtype == torch.bool else mask == 0
                return func(*args, **kwargs, attn_mask=self.allowed if mask is None else mask & self.allowed)
        if func in (torch.Tensor.softmax, torch.softmax, F.softmax) and tuple(args[0].shape[-2:]) == shape:
            return func(args[0].masked_fill(~self.allowed, float("-inf")), *args[1:], **kwargs)
        return func(*args, **kwargs)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with the totals and the reasons of what stays dense."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in rows:
        cells = row.cells()
        lines.append("| " + " | ".join([*cells, *[""] * (len(HEADER) - len(cells))]).replace("\n", " ") + " |")
    ran = [row for row in rows if not row.failure]
    exact = sum(row.replaced == row.expected and row.grid_right is not False for row in ran)
    wrong = sum(row.grid_right is False for row in ran)
    dense = [row for row in ran if row.replaced < row.expected and row.grid_right is not False]
    lines += ["", f"{len(rows)} cases: {exact} exact, {len(dense)} dense with a reason, {wrong} wrong, "
              f"{len(rows) - len(ran)} failed.", ""]  # fmt: skip
    lines += [f"- {row.name}: {'; '.join(row.reasons)}" for row in dense]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
