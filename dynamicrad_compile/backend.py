"""The torch.compile backend "dynamicrad": run the passes on a captured graph, hand it to the inner compiler."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import policy
from .errors import OptionsError, StrictError
from .options import Options
from .passes import Dense, PassContext, Site, run_passes
from .passes.dump import Dump
from .passes.graph import source_line
from .passes.site import OTHER_SELF, UNKNOWN, VIDEO
from .reporting.report import GraphReport, Report, SiteReport, TextTokens

Compiled = Callable[..., Any]

INNER = "dynamicrad_compile.inner"
"""Entry points of inner compilers that know our operations, called with the rewritten graph, its inputs, inner_options
and a function that notes a text in the report; other names are looked up among the backends of torch.compile."""


def dynamicrad(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Backend for `torch.compile(model, backend="dynamicrad", options={...})`; see `Options`.

    `mode` is torch.compile's and goes to Inductor. Raises OptionsError, ProfileError, GridError or StrictError;
    Dynamo shows them with its own prefix.
    """
    parsed = Options.from_mapping(options)
    report = analyse(gm, example_inputs, parsed)
    _captures[:] = [capture for capture in _captures if capture.is_alive()]
    _captures.append(_Capture(options, _parameters(example_inputs), report))
    start = time.perf_counter()
    compiled = _inner_compiler(parsed, mode, report.notes.append)(gm, example_inputs)
    report.seconds["compile"] = time.perf_counter() - start
    return compiled


def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, is_final: bool = False) -> GraphReport:
    """Run the passes on a graph, in place, and say what they did.

    An `is_final` graph, as of an exported program, has to serve all sizes that it allows.
    """
    wishes = policy.Wishes.of(options)
    context = PassContext(
        decide=lambda sites, conditions: policy.decide(sites, conditions, wishes),
        grid=options.grid,
        training=_is_training(example_inputs),
        example_inputs=example_inputs,
        qk_int8=options.qk_dtype == "int8",
        covariance=options.covariance,
        is_final=is_final,
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
    )


def _dump(options: Options) -> Dump | None:
    """What writes a graph into the folder of option dump, if that is set."""
    if options.dump is None:
        return None
    try:
        return Dump(options.dump)
    except OSError as error:
        raise OptionsError(f"option dump = {str(options.dump)!r}: no folder can be made in it ({error}).") from None


def report(compiled: Any) -> Report:
    """What was done in every graph captured so far from a compiled model (or from its uncompiled original).

    Graphs are recognised by the model's parameters and, where the model was compiled several times, by the
    options given to torch.compile.
    """
    model = getattr(compiled, "_orig_mod", compiled)
    wanted: set[int] = set()
    if isinstance(model, torch.nn.Module):
        wanted = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    given = _options_of(compiled)
    return Report([c.report for c in _captures if c.belongs_to(wanted) and (given is _ANY or c.options is given)])


@dataclass
class _Capture:
    """One captured graph: the options object it was compiled with and the parameters it reads."""

    options: Mapping[str, Any] | None
    parameters: list[weakref.ref[torch.Tensor]]
    report: GraphReport

    def is_alive(self) -> bool:
        """Whether the model may still be there."""
        return not self.parameters or any(ref() is not None for ref in self.parameters)

    def belongs_to(self, wanted: set[int]) -> bool:
        alive = {id(p) for ref in self.parameters if (p := ref()) is not None}
        return bool(alive & wanted) or (not wanted and not self.parameters)


_captures: list[_Capture] = []
_ANY = object()


def _parameters(example_inputs: Sequence[Any]) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(x) for x in example_inputs if isinstance(x, torch.nn.Parameter)]


def _options_of(compiled: Any) -> Any:
    """The options object of a torch.compile wrapper; _ANY where it can't be told."""
    callback = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    for _ in range(8):
        if callback is None:
            return _ANY
        kwargs = getattr(callback, "kwargs", None)
        if isinstance(kwargs, dict):
            return kwargs.get("options")
        callback = getattr(callback, "_torchdynamo_orig_backend", getattr(callback, "_torchdynamo_orig_callable", None))
    return _ANY


def _is_training(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


_NOTES = "aot_inductor.metadata"


@functools.cache
def _signatures() -> str:
    """A digest of the signatures of our ops, for the keys of the compile caches of PyTorch.

    Cached code calls the ops with the arguments that they had; a graph does not show those that have their defaults.
    """
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dynamicrad::")]
    schemas = [str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name in ours]
    return hashlib.sha256("\n".join(sorted(schemas)).encode()).hexdigest()[:16]


def _inner_compiler(
    options: Options, mode: str | None, note: Callable[[str], None]
) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    if options.inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**(list_mode_options(mode) if mode else {}), **options.inner_options}
        patches[_NOTES] = {**patches.get(_NOTES, {}), "dynamicrad": _signatures()}
        return lambda gm, inputs: compile_fx(gm, inputs, config_patches=patches)
    if mode is not None:
        raise OptionsError(f"mode={mode!r} is for Inductor, but inner={options.inner!r}; leave `mode` out.")
    if options.inner == "dynamicrad":
        raise OptionsError("inner='dynamicrad' would call itself; use 'inductor' or another backend.")
    for ours in importlib.metadata.entry_points(group=INNER, name=options.inner):
        compile_graph = ours.load()
        return lambda gm, inputs: compile_graph(gm, inputs, options.inner_options, note)
    from torch._dynamo.backends.registry import lookup_backend

    backend = lookup_backend(options.inner)
    return lambda gm, inputs: backend(gm, inputs, **options.inner_options)


def _check_strict(context: PassContext) -> None:
    """Raise StrictError if a video self-attention, or one that may be one, stays dense unasked, or a wish is unmet."""
    sites, decisions = context.sites, context.decisions
    pairs = zip(context.videos, decisions.sites, strict=True)
    asked = {video.node for video, decision in pairs if isinstance(decision, Dense) and decision.asked}
    video = any(site.role == VIDEO for site in sites)
    for site in sites:
        doubtful = site.role in (VIDEO, UNKNOWN) or (site.role == OTHER_SELF and not video)
        if doubtful and not site.replaced and site.node not in asked:
            raise StrictError(f"strict=True, and {site.path or site.node.name} stays dense: {site.reason}")
    if decisions.unmet:
        raise StrictError(f"strict=True, and {decisions.unmet[0]}")


def _site_report(site: Site) -> SiteReport:
    hidden = site.data_dependent  # sizes are stand-ins: not to be shown
    done, reason = site.replacement, site.reason
    text = TextTokens(*(None if n and hidden else n for n in site.text))
    return SiteReport(
        role=site.role,
        replaced=site.replaced,
        reason=reason.text if reason else "",
        grid=site.grid,
        text_tokens=text,
        shape=None if hidden else site.q_shape,
        kv_length=None if hidden else site.kv_length,
        sparsity=done.plan.sparsity - done.overhead if done is not None else 0.0,
        path=site.path,
        source=source_line(site.node),
        plan=done.plan if done is not None else None,
        stats=done.stats if done is not None else None,
        overhead=done.overhead if done is not None else 0.0,
        code=reason.code if reason else "",
        advice=reason.advice if reason else "",
    )
