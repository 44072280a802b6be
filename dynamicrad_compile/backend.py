"""The torch.compile backend "dynamicrad": run the passes on a captured graph, hand it to the inner compiler."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx

from . import policy
from .buckets import earlier_buckets, real_inputs
from .captured import remember
from .capturing import keep_sizes_constant
from .errors import OptionsError, StrictError
from .history import forget_with, seen_before
from .inner import Compiled, inner_compiler
from .kernels.tiles import asked_variant
from .options import Options
from .outside import continues, graph_made
from .passed_on import passes_on
from .passes import Dense, PassContext, Site, run_passes
from .passes.dump import Dump
from .passes.graph import source_line, value_of
from .passes.site import OTHER_SELF, UNKNOWN, VIDEO
from .reporting.report import GraphReport, SiteReport, TextTokens
from .runtime.beside import running
from .runtime.state import GraphState

log = logging.getLogger("dynamicrad_compile")


@passes_on
def dynamicrad(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Backend for `torch.compile(model, backend="dynamicrad", options={...})`; see `Options`.

    `mode` is torch.compile's and goes to Inductor. Raises OptionsError, ProfileError, RouterError, GridError or
    StrictError, and PlanError if the environment asks for a kernel that does not exist, at the first call of the
    compiled model: PyTorch shows a backend its options no earlier.
    """
    asked_variant()
    parsed = Options.from_mapping(options)
    keep_sizes_constant(gm)
    report = analyse(gm, example_inputs, parsed)
    inputs = [*example_inputs, *_added_inputs(gm, len(example_inputs))]
    start = time.perf_counter()
    run = report.state.bind(inner_compiler(parsed, mode, report.notes.append)(gm, inputs))
    report.seconds["compile"] = time.perf_counter() - start
    remember(options, report, run)
    forget_with(run)
    graph_made(gm, report.notes, parsed.strict)
    _say(report)
    return run


INT8: dict[str | None, Literal["never", "dense steps", "always"]] = {
    None: "never",
    "int8_dense": "dense steps",
    "int8": "always",
}
"""When scores are rounded, by the option qk_dtype."""


def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, is_final: bool = False) -> GraphReport:
    """Run the passes on a graph, in place, and say what they did.

    An `is_final` graph, as of an exported program, has to serve all sizes that it allows.
    """
    wishes = policy.Wishes.of(options, running() if options.call_state else None)
    context = PassContext(
        decide=lambda sites, conditions: policy.decide(sites, conditions, wishes),
        grid=options.grid,
        override_grid=options.override_grid,
        training=_is_training(example_inputs),
        example_inputs=real_inputs(example_inputs),
        qk_int8=INT8[options.qk_dtype],
        is_final=is_final,
        continues="" if is_final else continues(),
        earlier=earlier_buckets(),
        seen=seen_before(),
    )
    dump = _dump(options)
    if dump is not None:
        context.watch = dump
    start = time.perf_counter()
    run_passes(gm, context)
    total = time.perf_counter() - start
    if options.strict:
        _check_strict(context)
    plans = context.seconds.get("build_plans", 0.0)
    notes = list(context.notes)
    if options.plan is not None or any(site.replaced for site in context.sites):
        notes = [*context.decisions.unmet, *context.decisions.notes, *notes]
    if dump is not None and dump.problem:
        notes.append(f"option dump: {dump.problem}")
    return GraphReport(
        [_site_report(site) for site in context.sites],
        notes,
        {"passes": total - plans, "plans": plans},
        dump=str(dump.folder) if dump is not None else "",
        state=GraphState(context.slots),
        profiles=context.decisions.profiles,
        warnings=_warnings(context),
    )


def _added_inputs(gm: fx.GraphModule, own: int) -> list[Any]:
    """Example values of the inputs behind a graph's own; the graph that Dynamo made loses them, the module keeps them.

    Dynamo goes on reading the inputs of the graph that it made, to call what we return.
    """
    made = gm.graph
    added = made.find_nodes(op="placeholder")[own:]
    if not added:
        return []
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(made, copies))
    for node, copied in copies.items():
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    gm.graph = graph
    for node in added:
        node.replace_all_uses_with(made.find_nodes(op="output")[0].prev)
        made.erase_node(node)
    return [value_of(copies[node]) for node in added]


def _dump(options: Options) -> Dump | None:
    """What writes a graph into the folder of option dump, if that is set."""
    if options.dump is None:
        return None
    try:
        return Dump(options.dump)
    except OSError as error:
        raise OptionsError(f"option dump = {str(options.dump)!r}: no folder can be made in it ({error}).") from None


def _is_training(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def _left_dense(context: PassContext) -> list[Site]:
    """Video self-attentions, and what may be one, that stay dense though nobody asked for it."""
    pairs = zip(context.videos, context.decisions.sites, strict=True)
    asked = {video.node for video, decision in pairs if isinstance(decision, Dense) and decision.asked}
    roles = {site.role for site in context.sites}
    doubtful = (VIDEO, UNKNOWN) if VIDEO in roles else (VIDEO, UNKNOWN, OTHER_SELF)
    return [s for s in context.sites if s.role in doubtful and not s.replaced and s.node not in asked]


def _check_strict(context: PassContext) -> None:
    """Raise StrictError if a video self-attention, or one that may be one, stays dense unasked, or a wish is unmet."""
    for site in _left_dense(context):
        raise StrictError(f"strict=True, and {site.path or site.node.name} stays dense: {site.reason}")
    if context.decisions.unmet:
        raise StrictError(f"strict=True, and {context.decisions.unmet[0]}")


def _warnings(context: PassContext) -> list[str]:
    """What the user would want to know at once: wishes that are not met, a graph in which nothing was replaced."""
    if any(site.replaced for site in context.sites):
        return list(context.decisions.unmet)
    dense = _left_dense(context)
    if not dense:
        return []
    first = dense[0]
    where, advice = first.path or first.node.name, first.reason.advice if first.reason else ""
    text = f"{where} ({len(dense)} such) stays dense: {first.reason}. {advice}".strip()
    return [f"no attention of this graph was replaced: {text}"]


def _say(report: GraphReport) -> None:
    """A line in the log for each graph, a warning for each disappointment."""
    graph = torch._guards.CompileContext.current_compile_id()
    log.info("[%s] %s", graph, report.line())
    for text in report.warnings:
        log.warning("[%s] %s", graph, text)


def _site_report(site: Site) -> SiteReport:
    hidden = site.data_dependent  # sizes are stand-ins: not to be shown
    done, reason = site.replacement, site.reason
    text = TextTokens(*(None if n and hidden else n for n in site.asked_text))
    chunks = tuple(_site_report(chunk) for chunk in site.chunks) if site.replaced else ()
    return SiteReport(
        role=site.role,
        replaced=site.replaced,
        reason=reason.text if reason else "",
        grid=site.grid,
        text_tokens=text,
        shape=None if hidden else site.q_shape,
        kv_length=None if hidden else site.kv_length,
        sparsity=done.sparsity - done.overhead if done is not None else 0.0,
        path=site.path,
        source=source_line(site.node),
        plan=done.plan if done is not None else None,
        slot=done.stats if done is not None else "",
        search_slot=done.searches if done is not None else "",
        overhead=done.overhead if done is not None else 0.0,
        code=reason.code if reason else "",
        advice=reason.advice if reason else "",
        queries=None if hidden else site.queries,
        chunks=chunks,
        asks=site.group.rows if site.group is not None else None,
        reads=site.group.keys if site.group is not None else (),
        dtype=str(site.call.dtype or getattr(value_of(site.call.query), "dtype", "")).removeprefix("torch."),
    ).measured()
