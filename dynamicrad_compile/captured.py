"""Which graphs belong to a model: those that its code has called. Dynamo shares graphs between models of equal code."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch

from .noting import notes_of
from .reporting.report import GraphReport, Report
from .runtime.owner import Owner, alive
from .runtime.pool import MIXED_CALLS
from .runtime.state import GraphState

NOT_OURS = (
    "it is not compiled with this backend. Use torch.compile(model, backend='dynamicrad') or "
    "dynamicrad_compile.compile(model)"
)
NOT_CALLED = "no graph has been captured yet; call the compiled model first"


@dataclass
class Captured:
    """A graph: the options that it was compiled with, and what was done."""

    options: Mapping[str, Any] | None
    report: GraphReport


_captured: dict[int, Captured] = {}  # in order of capture
_numbers = itertools.count()
_ANY = object()


def remember(options: Mapping[str, Any] | None, report: GraphReport, run: Callable[..., Any]) -> None:
    """Keep the report of a graph, and its state, for as long as Dynamo keeps the graph."""
    number = next(_numbers)
    _captured[number] = Captured(options, report)
    weakref.finalize(run, _captured.pop, number, None)


def report(compiled: Any) -> Report:
    """What was done in every graph that a model has called.

    compiled: what torch.compile or drad.compile returned (a module, function or method), a model with compiled parts
    (`model.compile()`, regional compilation, DDP, FSDP), or an object that holds such models as attributes, like a
    pipeline, of which every compiled part is reported, its name in front of the paths. Of a model that was compiled
    several times, that which was done with the options given here; of the uncompiled original, everything.

    Numbers that are known only when graphs run are those of the calls so far; reading them waits for the device.
    Raises TypeError for anything else.
    """
    if isinstance(compiled, torch.nn.Module) or inspect.isroutine(compiled):
        graphs = _graphs(compiled)
        if graphs and notes_of(compiled).mixed:
            graphs[-1].notes.append(MIXED_CALLS)
        return Report(graphs, why_empty=NOT_CALLED if _is_ours(compiled) else NOT_OURS)
    if not hasattr(compiled, "__dict__"):
        raise TypeError(
            "expected a compiled model, function or method, or an object that holds compiled models, like a pipeline; "
            f"got {type(compiled).__name__}."
        )
    parts = {name: part for name, part in _parts(compiled) if _graphs(part) or _is_ours(part)}
    graphs = [_below(name, graph) for name, part in parts.items() for graph in _graphs(part)]
    return Report(graphs, why_empty=NOT_CALLED if parts else NOT_OURS)


def _graphs(compiled: Any) -> list[GraphReport]:
    holders, code = _holders(compiled), _code(compiled)
    given = _options_of(compiled)

    def is_mine(owner: Owner, state: GraphState) -> bool:
        if owner and holders:
            return any(id(value) in holders for value in alive(owner))
        return code in state.codes

    found = []
    for one in list(_captured.values()):
        if given is not _ANY and not _equal(one.options, given):
            continue
        state = one.report.state
        owners = [owner for owner in state.owners() if is_mine(owner, state)]
        if owners:
            found.append(one.report.measured(owners))
    return found


def _holders(compiled: Any) -> dict[int, Any]:
    """Modules and objects whose calls are those of `compiled`, by id."""
    function = _original(compiled)
    held = [function, getattr(function, "__self__", None)]
    held += list(vars(held[1]).values()) if hasattr(held[1], "__dict__") else []
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        held += [*names.nonlocals.values(), *names.globals.values()]
    modules = [module for value in held if isinstance(value, torch.nn.Module) for module in _original(value).modules()]
    return {id(value): value for value in (held[1], *modules) if value is not None}


def _code(compiled: Any) -> tuple[str, int] | None:
    """File and line of a function; None for anything else, a method too."""
    code = getattr(_original(compiled), "__code__", None) if inspect.isfunction(_original(compiled)) else None
    return (code.co_filename, code.co_firstlineno) if isinstance(code, CodeType) else None


def _original(compiled: Any) -> Any:
    """What was given to torch.compile."""
    if isinstance(compiled, torch.nn.Module):
        return getattr(compiled, "_orig_mod", compiled)
    return getattr(compiled, "_torchdynamo_orig_callable", compiled)


def _parts(holder: Any) -> Iterator[tuple[str, Any]]:
    """Modules and compiled functions among the attributes of an object; diffusers keeps a table of components too."""
    components = getattr(holder, "components", None)
    named = {**(components if isinstance(components, dict) else {}), **getattr(holder, "__dict__", {})}
    for name, value in named.items():
        if isinstance(value, torch.nn.Module) or _backends(value):
            yield name, value


def _below(name: str, graph: GraphReport) -> GraphReport:
    return replace(graph, sites=[replace(site, path=f"{name}.{site.path}".strip(".")) for site in graph.sites])


def _is_ours(compiled: Any) -> bool:
    """Whether something, or a module in it, is compiled with this backend."""
    inside = compiled.modules() if isinstance(compiled, torch.nn.Module) else [compiled]
    return any(backend == "dynamicrad" for one in inside for backend, _ in _backends(one))


def _backends(compiled: Any) -> list[tuple[str, Any]]:
    """(name, options) of the backends that something itself is compiled with."""
    found = []
    for one in (compiled, *(getattr(compiled, name, None) for name in ("_compiled_call_impl", "forward"))):
        for context in _contexts(one):
            callback: Any = getattr(context, "callback", None)
            for _ in range(8):
                if callback is None:
                    break
                kwargs = getattr(callback, "kwargs", None)
                if isinstance(kwargs, dict):
                    found.append((str(getattr(callback, "compiler_name", "")), kwargs.get("options")))
                    break
                callback = getattr(
                    callback, "_torchdynamo_orig_backend", getattr(callback, "_torchdynamo_orig_callable", None)
                )
    return found


def _contexts(compiled: Any) -> list[Any]:
    """Dynamo's contexts of a compiled module or function."""
    if "dynamo_ctx" in getattr(compiled, "__dict__", {}):
        return [compiled.dynamo_ctx]
    if not inspect.isfunction(compiled):
        return []
    if not hasattr(compiled, "_torchdynamo_orig_callable"):
        return []
    cells = compiled.__closure__ or ()
    held = [cell.cell_contents for cell in cells if not _is_empty(cell)]
    return [value for value in held if hasattr(value, "callback")]


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _options_of(compiled: Any) -> Any:
    """The options that something was given to torch.compile with; _ANY where it was not, or they can't be told."""
    if isinstance(compiled, torch.nn.Module) and not hasattr(compiled, "_orig_mod"):
        return _ANY
    found = _backends(compiled)
    return found[0][1] if found else _ANY


def _equal(one: Any, other: Any) -> bool:
    """Whether Dynamo would take two options for the same; tensors and arrays among them can't be compared."""
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):
        return False
