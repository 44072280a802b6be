"""The rows as Markdown: the page of a run, and the short table printed at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .runner import Values

Cell = Callable[[Values], Any]
MIB = 1 << 20
TARGETS = """\
Aims on an H200 (bf16, head_dim 128, from 32k tokens, 80 % sparse): 450 TFLOP/s on active blocks, 3.75x over the best
dense backend, 1.2x over FlexAttention with the same blocks; selection, router and plan at most 2 % of the attention;
backward 3x over dense; compensation at most 8 %. Public figure for block-sparse attention there: 316 TFLOP/s."""

PLUMBING = "A reduced run: it shows that the suite works. Its figures say nothing about speed."


def page(content: Values) -> str:
    """The whole Markdown page of a run."""
    about, rows = content["about"], content["rows"]
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items() if value is not None)
    about_figures = PLUMBING if content["reduced"] else TARGETS
    parts = [f"# {content['name']}", f"    {content['command']}", facts, about_figures, _ceilings(content)]
    for title, group, columns in SECTIONS:
        own = [row for row in rows if row["group"] == group and row["status"] == "ok"]
        if own:
            parts += [f"## {title}", _table(columns, own, content)]
    parts += [_roofline(rows), _proposals(content), _others(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def short(content: Values) -> str:
    """The figures that matter most, for the end of the output."""
    rows = content["rows"]
    order = {"correctness": 0}
    count = {s: sum(row["status"] == s for row in rows) for s in ("ok", "failed", "unsupported", "skipped")}
    lines = [f"{content['about']['chip']}: " + ", ".join(f"{n} {status}" for status, n in count.items() if n)]
    checks = [row for row in rows if row["group"] == "correctness"]
    passed = sum(row["status"] == "ok" for row in checks)
    if checks:
        lines.append(f"correctness: {passed} of {len(checks)} checks passed")
    for title, group, columns in SECTIONS:
        own = [row for row in rows if row["group"] == group and row["status"] == "ok"]
        if own and group not in order and group not in ("tiles", "builds"):
            lines += ["", title, _table(columns, own, content)]
    for item in content.get("tile_proposal", []):
        lines.append(_proposal(item))
    bad = [row for row in rows if row["status"] == "failed"]
    lines += ["", *(f"FAILED {row['name']}: {row['why']}" for row in bad)]
    return "\n".join(lines).rstrip()


def _over(backend: str) -> Cell:
    return lambda row: _times(row.get("over", {}).get(backend))


def _flex(row: Values, content: Values) -> str:
    name = row["name"].replace("forward/", "flex/")
    found = next((r for r in content["rows"] if r["name"] == name and r["status"] == "ok"), None)
    return _times(found["ms"] / row["ms"]) if found else "-"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:.0f}"


def _tokens(row: Values) -> str:
    return f"{row['tokens']:,}"


def _missing(row: Values) -> str:
    return "; ".join(f"{name}: {why}" for name, why in row.get("missing", {}).items())


SPARSE = {"tokens": _tokens, "heads": lambda r: r["heads"], "dim": lambda r: r["head_dim"],
          "sparsity": lambda r: _share(r["sparsity"])}  # fmt: skip
SECTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Correctness", "correctness", {
        "kernel": lambda r: r["kernel"], "case": lambda r: r["case"],
        "error": lambda r: f"{r['error']:.1e}", "bound": lambda r: f"{r['bound_of_error']:.0e}",
    }),
    ("Dense", "dense", {
        "tokens": _tokens, "heads": lambda r: r["heads"], "dim": lambda r: r["head_dim"],
        **{f"{b} ms": lambda r, b=b: _ms(r["backends_ms"].get(b)) for b in ("cudnn", "flash", "efficient")},
        "best TFLOP/s": lambda r: f"{r['tflops']:.3g}", "MiB": lambda r: _mib(r["memory_bytes"]), "missing": _missing,
    }),
    ("Forward", "forward", {
        **SPARSE, "ms": lambda r: _ms(r["ms"]), "spread": lambda r: f"{r['spread']:.0%}",
        "graph ms": lambda r: _ms(r["graph_ms"]), "TFLOP/s": lambda r: f"{r['tflops']:.3g}",
        "/ cudnn": _over("cudnn"), "/ flash": _over("flash"), "/ efficient": _over("efficient"), "/ flex": _flex,
        "of ideal": lambda r: _share(r["of_ideal"]), "bound": lambda r: f"{r['bound']} ({r['of_floor']:.0%})",
        "MiB": lambda r: _mib(r["memory_bytes"]),
    }),
    ("Backward", "backward", {
        **SPARSE, "form": lambda r: r.get("kernel", "op"), "ms": lambda r: _ms(r["ms"]),
        "TFLOP/s": lambda r: f"{r['tflops']:.3g}",
        "best dense": lambda r: r.get("best_dense", "-"), "dense ms": lambda r: _ms(r.get("best_dense_ms")),
        "gain": lambda r: _times(r["gain"]), "of ideal": lambda r: _share(r.get("of_ideal")),
        "MiB": lambda r: _mib(r["memory_bytes"]),
    }),
    ("Beside the attention", "overhead", {
        "what": lambda r: r["what"], "tokens": _tokens, "dim": lambda r: r["head_dim"], "ms": lambda r: _ms(r["ms"]),
        "attention ms": lambda r: _ms(r["attention_ms"]), "share": lambda r: _share(r["share"]),
        "": lambda r: r.get("summary", ""),
    }),
    ("CUDA graphs", "graphs", {"check": lambda r: r["name"], "result": lambda r: r["summary"]}),
    ("Whole block and step", "steps", {
        "what": lambda r: r["what"], "width": lambda r: r["width"], "tokens": _tokens,
        "sparsity": lambda r: _share(r["sparsity"]), "dense ms": lambda r: _ms(r["dense_ms"]),
        "sparse ms": lambda r: _ms(r["ms"]), "gain": lambda r: _times(r["gain"]), "ideal": lambda r: _times(r["ideal"]),
        "dense by": lambda r: r["best_dense"] or "default", "MiB dense": lambda r: _mib(r["dense_memory_bytes"]),
        "MiB sparse": lambda r: _mib(r["memory_bytes"]), "compile s": lambda r: f"{r['compile_s']:.0f}",
    }),
    ("Builds", "builds", {
        "arch": lambda r: r["arch"], "dim": lambda r: r["head_dim"], "kernel": lambda r: r["kernel"],
        "tile": lambda r: f"{r['block_m']} x {r['block_n']}, {r['num_warps']} warps, {r['num_stages']} stages",
        "what ptxas says": lambda r: r["summary"], "s": lambda r: f"{r['build_s']:.1f}",
    }),
    ("Tiles", "tiles", {
        "tokens": _tokens, "dim": lambda r: r["head_dim"],
        "tile": lambda r: f"{r['block_m']} x {r['block_n']}, {r['num_warps']} warps, {r['num_stages']} stages",
        "kernel": lambda r: r["kernel"], "ms": lambda r: _ms(r["ms"]),
        "TFLOP/s": lambda r: f"{r['tflops']:.3g}", "now": lambda r: "yes" if r["is_current"] else "",
    }),
)  # fmt: skip


def _table(columns: dict[str, Any], rows: list[Values], content: Values) -> str:
    head = "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|"
    lines = [
        "| " + " | ".join(str(f(row, content) if f is _flex else f(row)) for f in columns.values()) + " |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def _ceilings(content: Values) -> str:
    found = content.get("ceilings")
    if not found:
        return ""
    rates = found["ceilings"]
    parts = [f"matrix product {found['matmul_tflops']:.3g} TFLOP/s", f"copy {found['copy_tbs']:.3g} TB/s",
             f"launch {found['launch_us']:.2g} us", f"exponentials {rates['exp']:.3g} T/s"]  # fmt: skip
    sheet = f" (data sheet: {rates['sheet_tensor']:.0f} TFLOP/s, {rates['sheet_memory']:.3g} TB/s)"
    return "Ceilings, measured: " + ", ".join(parts) + (sheet if rates["sheet_tensor"] else "") + "."


def _roofline(rows: list[Values]) -> str:
    lines = []
    for row in rows:
        if row["group"] == "forward" and row["status"] == "ok":
            each = ", ".join(f"{name} {_ms(ms)}" for name, ms in sorted(row["terms_ms"].items(), key=lambda t: -t[1]))
            floor = f"{_ms(row['floor_ms'])} of {_ms(row['ms'])} ms"
            lines.append(f"- {row['name']}: {row['bound']} bounds it, {floor} ({each})")
    return "\n".join(["## Roofline", "", *lines]) if lines else ""


def _proposals(content: Values) -> str:
    items = [_proposal(item) for item in content.get("tile_proposal", [])]
    return "\n".join(["## Proposal for the tile table", "", *(f"- {item}" for item in items)]) if items else ""


def _proposal(item: Values) -> str:
    now = "" if item["current_score"] is None else f", the table's own {item['current_score']:.3f}"
    return (
        f"{item['dtype']} head_dim {item['head_dim']}: tile = {item['tile']}, kernel = {item['kernel']}, "
        f"{item['score']:.3f} of the fastest at each length{now}"
    )


def _others(rows: list[Values]) -> str:
    lines = [f"- {row['status']} {row['name']}: {row['why']}" for row in rows if row["status"] != "ok"]
    return "\n".join(["## Not measured", "", *lines]) if lines else ""
