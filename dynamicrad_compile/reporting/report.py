"""Report: what was done to each attention of each captured graph, and why not."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import write_file
from ..plans.plan import BlockPlan
from ..runtime.owner import Owner
from ..runtime.pool import MIXED_CALLS
from ..runtime.state import GraphState
from .expectation import Expectation

SEARCH = 0.5
"""A search is one of the two products of dense attention."""

NOT_PLAIN = ("plan", "stats", "slot", "search_slot", "search_stats")
"""Fields of a site that are no plain values."""


class TextTokens(NamedTuple):
    """Tokens of a sequence that are not on the grid, before and after the video; None where data decide."""

    before: int | None
    after: int | None


@dataclass(frozen=True)
class SiteReport:
    """One attention call of a captured graph.

    role         "video_self_attention" | "spatial_attention" | "temporal_attention" | "cross_attention" |
                 "self_attention" (no grid in it: text, image) | "unknown"
    replaced     whether block-sparse attention took its place
    reason       why it stayed dense; empty where it was replaced
    grid         (frames, height, width) in latent tokens, or None
    text_tokens  tokens of the sequence that asks before and after the video
    shape        query shape (batch, heads, tokens, head_dim), or None where it depends on data
    kv_length    number of keys
    queries      (start, stop) of the keys whose tokens ask, where these are not all; else None. The grid lies among the
                 keys, and may begin before the queries do
    sparsity     share of dense attention that is skipped, 0.0 where dense. Where it is decided when the graph runs
                 (mode dynamic_threshold, router, dense steps): the mean over all calls so far; before the first one
                 that of the plan, of all regimes, and where thresholds choose of all candidates. Searches are paid for
    path         dotted path of the module
    source       file and line of the call in the model's code
    graph        number of the captured graph, from 0
    plan         the block plan, or None; one for each regime, and the candidates in mode dynamic_threshold
    stats        sums over the calls so far, on the device; None where the plan is all there is to know
    slot         where the running graph keeps these sums; empty likewise
    overhead     share of dense attention that option covariance adds; taken off from sparsity
    code         short name of the kind of reason (docs/reasons.md); empty where it was replaced
    advice       what to do about it; empty where it was replaced
    chunks       where its mask shows other keys to some queries than to others: the attentions of these groups of
                 queries, one after the other, sparse or dense. Keys that the mask hides count as skipped
    search_slot  where the running graph keeps the sums of its searches; search_stats: these sums, on the device
    search_share share of dense attention that searches cost, the mean over all calls so far
    dtype        of the computation, such as "bfloat16"; empty where the graph does not tell
    recall       of each head the share of its attention that the blocks found hold, the mean over searches; empty where
                 nothing has been searched
    asks, reads  of such a chunk: (start, stop) of the queries of the whole, and of the keys that these may read, as
                 one or more ranges
    """

    role: str
    replaced: bool
    reason: str
    grid: tuple[int, int, int] | None
    text_tokens: TextTokens
    shape: tuple[int, ...] | None
    kv_length: int | None
    sparsity: float
    path: str
    source: str = ""
    graph: int = 0
    plan: BlockPlan | None = field(default=None, repr=False)
    stats: torch.Tensor | None = field(default=None, repr=False)
    slot: str = field(default="", repr=False)
    overhead: float = 0.0
    code: str = ""
    advice: str = ""
    queries: tuple[int, int] | None = None
    chunks: tuple[SiteReport, ...] = ()
    asks: tuple[int, int] | None = None
    reads: tuple[tuple[int, int], ...] = ()
    search_slot: str = field(default="", repr=False)
    search_stats: torch.Tensor | None = field(default=None, repr=False)
    search_share: float = 0.0
    recall: tuple[float, ...] = ()
    dtype: str = ""

    def measured(self) -> SiteReport:
        """The same with the sparsity of the calls so far; reading it waits for the device."""
        if self.chunks:
            chunks = tuple(chunk.measured() for chunk in self.chunks)
            left = sum(chunk.flops for chunk in chunks) / max(self.dense_flops, 1)
            return replace(self, chunks=chunks, sparsity=1.0 - left)
        if self.stats is None:
            return self
        computed, calls = self.stats.tolist()
        if not calls:
            return self
        searches, *recalls = [0.0] if self.search_stats is None else self.search_stats.tolist()
        return replace(
            self,
            sparsity=1.0 - computed / calls - SEARCH * searches / calls,
            search_share=SEARCH * searches / calls,
            recall=tuple(recall / searches for recall in recalls) if searches else (),
        )

    @property
    def dense_flops(self) -> int:
        """Multiply-adds counted twice for the dense attention: 4 x batch x heads x queries x keys x head_dim."""
        if self.shape is None or self.kv_length is None or len(self.shape) < 3:
            return 0
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return 4 * rows * self.kv_length * self.shape[-1]

    @property
    def flops(self) -> int:
        """FLOPs of the attention as it is now."""
        return round(self.dense_flops * (1.0 - self.sparsity))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; tensors are left out."""
        values = {k: v for k, v in self.__dict__.items() if k not in NOT_PLAIN}
        values["text_tokens"] = self.text_tokens._asdict()
        values["chunks"] = [chunk.to_dict() for chunk in self.chunks]
        return {**values, "dense_flops": self.dense_flops, "flops": self.flops}


@dataclass
class GraphReport:
    """What happened to one captured graph.

    seconds  of passes, plans and inner compilation
    dump     folder with the graph before and after each pass (option `dump`); empty if it was not asked for
    state    what the graph remembers from call to call, and of whom
    profiles that its plans come from
    warnings what goes to the log at once
    """

    sites: list[SiteReport]
    notes: list[str]
    seconds: dict[str, float]
    dump: str = ""
    state: GraphState = field(default_factory=GraphState, repr=False)
    profiles: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def line(self) -> str:
        """What was done, in a line."""
        video = [site for site in self.sites if site.role == "video_self_attention"]
        replaced = [site for site in self.sites if site.replaced]
        seconds = f"compiled in {sum(self.seconds.values()):.1f} s"
        counts = f"{len(replaced)} of {len(video)} video self-attentions replaced ({len(self.sites)} attentions)"
        if not replaced:
            return f"{counts}; {seconds}"
        sparsity = sum(site.sparsity for site in replaced) / len(replaced)
        profiles = f", profile {', '.join(self.profiles)}" if self.profiles else ""
        return f"{counts}, grid {_grids(replaced)}, sparsity {sparsity:.1%}{profiles}; {seconds}"

    def measured(self, owners: Sequence[Owner]) -> GraphReport:
        """The same with the sums of what these owners have called so far."""
        pools = [self.state.pool_of(owner) for owner in owners]

        def summed(site: SiteReport) -> SiteReport:
            if site.chunks:
                return replace(site, chunks=tuple(map(summed, site.chunks)))
            return replace(site, stats=sums(site.slot), search_stats=sums(site.search_slot))

        def sums(slot: str) -> torch.Tensor | None:
            totals = [pool.total(self.state.place_of(slot)) for pool in pools] if slot else []
            known = [total for total in totals if total is not None]
            return torch.stack(known).sum(0) if known else None

        notes = [*self.notes, *[MIXED_CALLS][: any(pool.mixed for pool in pools)]]
        return replace(self, sites=[summed(site) for site in self.sites], notes=notes)


@dataclass
class Report:
    """Reports of all graphs captured from one model, in order of capture.

    why_empty  why there is none
    expected   what `explain` expects of the speed, one for each device that was asked for
    """

    graphs: list[GraphReport] = field(default_factory=list)
    why_empty: str = "no graph has been captured"
    expected: tuple[Expectation, ...] = ()

    @property
    def sites(self) -> list[SiteReport]:
        """All sites of all graphs."""
        return [replace(site.measured(), graph=i) for i, graph in enumerate(self.graphs) for site in graph.sites]

    @property
    def notes(self) -> list[str]:
        """Remarks that concern no single site."""
        return list(dict.fromkeys(note for graph in self.graphs for note in graph.notes))

    @property
    def dumps(self) -> list[str]:
        """Folders into which option `dump` wrote the graphs."""
        return [graph.dump for graph in self.graphs if graph.dump]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent, summed over graphs: "passes" (without plans), "plans", "compile" (inner backend)."""
        total: dict[str, float] = {}
        for graph in self.graphs:
            for name, value in graph.seconds.items():
                total[name] = total.get(name, 0.0) + value
        return total

    @property
    def replaced(self) -> list[SiteReport]:
        """Sites where block-sparse attention took the place of dense attention."""
        return [site for site in self.sites if site.replaced]

    def summary(self) -> str:
        """A few lines: how many sites were replaced, on which grids, how much attention work is left."""
        if not self.graphs:
            return f"dynamicrad: {self.why_empty}."
        sites, replaced = self.sites, self.replaced
        video = [site for site in sites if site.role == "video_self_attention"]
        lines = [
            f"dynamicrad: {len(replaced)} of {len(video)} video self-attentions replaced "
            f"({len(sites)} attentions in {len(self.graphs)} graph{'s' * (len(self.graphs) != 1)})"
        ]
        if replaced:
            mean = sum(site.sparsity for site in replaced) / len(replaced)
            before, after = sum(s.dense_flops for s in sites), sum(s.flops for s in sites)
            lines.append(
                f"grid {_grids(replaced)}; sparsity {mean:.1%}; all attention {before / 1e9:.1f} -> "
                f"{after / 1e9:.1f} GFLOP a call ({1 - after / max(before, 1):.1%} saved)"
            )
        recalls = [recall for site in replaced for recall in site.recall]
        if recalls:
            share = sum(site.search_share for site in replaced) / len(replaced)
            lines.append(
                f"searches cost {share:.1%} of dense attention; of their attention heads keep {min(recalls):.0%} to "
                f"{max(recalls):.0%}, {sum(recalls) / len(recalls):.0%} in the mean"
            )
        dense = [
            site.reason for site in sites if site.role in ("video_self_attention", "unknown") and not site.replaced
        ]
        for reason in dict.fromkeys(dense):
            count = dense.count(reason)
            lines.append(f"left dense ({count}): {reason}")
        lines.extend(f"note: {note}" for note in self.notes)
        lines.extend(f"written: {folder}" for folder in self.dumps)
        return "\n".join(lines)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON."""
        return json.dumps(
            {
                "summary": self.summary(),
                "seconds": self.seconds,
                "notes": self.notes,
                "expected": [one.to_dict() for one in self.expected],
                "dumps": self.dumps,
                "sites": [site.to_dict() for site in self.sites],
            },
            indent=indent,
        )

    def __str__(self) -> str:
        rows = [_HEADER, *_rows(self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER) - 1)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
        ]
        if not self.sites:
            return self.summary()
        expected = ["", *map(str, self.expected)] if self.expected else []
        return "\n".join([self.summary(), "", *lines, *expected, *self._advice()])

    def _advice(self) -> list[str]:
        """Lines that say what to do about dense attention, each advice once."""
        modules: dict[str, dict[str, None]] = {}
        for site in self.sites:
            if site.advice:
                modules.setdefault(site.advice, {})[starred(site.path)] = None
        lines = [f"  {', '.join(names)}: {advice}" for advice, names in modules.items()]
        return ["", "what to do about dense ones", *lines] if lines else []

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        body = "".join(
            f"<tr class={'y' if row[1] == 'sparse' else 'n'}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for row in _rows(self.sites, more=True)
        )
        head = "".join(f"<th>{cell}</th>" for cell in (*_HEADER, "code", "what to do"))
        write_file(
            path,
            "<!doctype html><html lang=en><meta charset=utf-8><title>dynamicrad report</title>"
            '<meta name=viewport content="width=device-width"><style>'
            "body{font:14px/1.4 system-ui,sans-serif;margin:1.5em clamp(1em,4vw,3em)}div{overflow-x:auto}"
            "pre{background:#f4f4f4;padding:1em;white-space:pre-wrap;overflow-wrap:anywhere}"
            "table{border-collapse:collapse}td,th{padding:.4em .8em;border-bottom:1px solid #ddd;text-align:left}"
            "td{vertical-align:top}td:nth-child(9),td:nth-child(11){min-width:11em}"
            ".y td:nth-child(2){color:#070}.n td:nth-child(2){color:#666}</style>"
            f"<h1>dynamicrad report</h1><pre>{html.escape(self.summary())}</pre>"
            f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            + "".join(f"<p>{html.escape(str(one))}</p>" for one in self.expected)
            + "</html>\n",
        )


_HEADER = ("module", "now", "role", "query", "keys", "grid", "text", "sparsity", "why dense")


def _rows(sites: Iterable[SiteReport], more: bool = False) -> list[tuple[str, ...]]:
    """Table rows, with `more` also code and advice; sites of the same kind in numbered modules are put together."""
    rows: dict[tuple[str, ...], int] = {}
    first: dict[tuple[str, ...], str] = {}
    for site in sites:
        key = (
            starred(site.path),
            "sparse" if site.replaced else "dense",
            site.role,
            "x".join(map(str, site.shape)) if site.shape else "?",
            _keys(site),
            "x".join(map(str, site.grid)) if site.grid else "-",
            "+".join("?" if n is None else str(n) for n in site.text_tokens),
            f"{site.sparsity:.1%}" if site.replaced else "-",
            site.reason,
            *((site.code, site.advice) if more else ()),
        )
        rows[key] = rows.get(key, 0) + 1
        first.setdefault(key, site.path or "(root)")
    return [(first[key] if n == 1 else f"{key[0]} (x{n})", *key[1:]) for key, n in rows.items()]


def _keys(site: SiteReport) -> str:
    """Number of keys, and which of them ask."""
    if site.kv_length is None:
        return "?"
    if site.chunks:
        return f"{site.kv_length} in {len(site.chunks)} chunks"
    return f"{site.kv_length}" + ("" if site.queries is None else " ({}..{} ask)".format(*site.queries))


def _grids(sites: Iterable[SiteReport]) -> str:
    return ", ".join(dict.fromkeys("x".join(map(str, site.grid)) for site in sites if site.grid))


def starred(path: str) -> str:
    """A module path with layer numbers as a star: blocks.3.attn1 -> blocks.*.attn1."""
    return ".".join("*" if piece.isdigit() else piece for piece in path.split(".")) or "(root)"


__all__ = ["GraphReport", "Report", "SiteReport", "TextTokens"]
