"""Write a graph as the passes see it: a folder for each graph, in it a file before the first pass and after each.

    graph_000/0_captured.txt, 1_gather_ring.txt, ..., 8_replace_attention.txt

On top of each file are the seconds of the pass and every site; below, one line for each node, with sites and
conditions marked above the nodes that they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from dynamicrad_compile.files import write_file

from .context import PassContext
from .graph import module_path, source_line, value_of
from .reading.not_video import describe
from .site import UNKNOWN, Site


class Dump:
    """A `PassContext.watch` that writes one graph into a new folder inside another.

    Raises OSError if that folder can't be made. An error while files are written ends the writing alone; `problem`
    says which it was.
    """

    def __init__(self, parent: Path):
        self.folder = _new_folder(parent)
        self.problem = ""
        self._count = 0
        self._body: list[str] = []

    def __call__(self, step: str, gm: fx.GraphModule, context: PassContext) -> None:
        """Write the graph as it is after a step."""
        if self.problem:
            return
        body = [_node_line(node) for node in gm.graph.nodes]
        head = [f"# {step}", *_summary(step, context, changed=bool(self._count) and body != self._body)]
        marked = _with_marks(list(gm.graph.nodes), body, _marks(context))
        text = "\n".join([*head, "", *marked, ""])
        try:
            write_file(self.folder / f"{self._count}_{step}.txt", text)
        except OSError as error:
            self.problem = str(error)
        self._count += 1
        self._body = body


def _new_folder(parent: Path) -> Path:
    """A folder that nobody else has: `mkdir` fails where another process was first."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = parent / f"graph_{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("itertools.count ends")


def _summary(step: str, context: PassContext, changed: bool) -> Iterator[str]:
    """Comments on a pass and its sites."""
    seconds = context.seconds.get(step)
    if seconds is not None:
        yield f"# {seconds:.4f} s; the graph {'changed' if changed else 'is as it was'}"
    yield f"# {len(context.sites)} sites, {sum(site.replaced for site in context.sites)} of them replaced"
    for number, site in enumerate(context.sites):
        where = " ".join(filter(None, (site.path or "(root)", source_line(site.node))))
        yield f"#   site {number} at {site.node.name}, {where}: {_state(site, context)}"


def _state(site: Site, context: PassContext) -> str:
    """What is known of a site."""
    pieces = [] if site.role == UNKNOWN and site.reason is None else [site.role]
    if site.grid is not None:
        before, after = site.text
        pieces.append(f"grid {'x'.join(map(str, site.grid))}, text {before}+{after}")
    if site.trace is not None and site.reason is None and site.grid is None:
        pieces.append(f"tokens {describe(site.trace.query[-2])}, keys {describe(site.trace.key[-2])}")
    plans = [p.table.plan for p in context.planned if p.video.site is site]
    if site.reason is not None:
        pieces.append(f"dense, {site.reason.code}: {site.reason}")
    elif site.replaced and site.chunks:
        sparse = sum(chunk.replaced for chunk in site.chunks)
        pieces.append(f"replaced in {len(site.chunks)} chunks of queries, {sparse} of them sparse")
    elif plans:
        done = "replaced" if site.replaced else "planned"
        pieces.append(f"{done}, {plans[0].sparsity:.1%} skipped in blocks of {plans[0].block_q} x {plans[0].block_kv}")
    return "; ".join(pieces) or "not classified"


def _marks(context: PassContext) -> dict[fx.Node, list[str]]:
    """What is to be said above a node."""
    marks: dict[fx.Node, list[str]] = {}
    for number, site in enumerate(context.sites):
        node = site.replacement.node if site.replacement is not None else site.node
        marks.setdefault(node, []).append(f"site {number}: {_state(site, context)}")
    conditions = context.conditions
    named = {"timestep": conditions.timestep, "prompt": conditions.prompt, "mask of the prompt": conditions.mask}
    for name, condition in named.items():
        if condition is not None:
            marks.setdefault(condition, []).append(name)
    return marks


def _with_marks(nodes: list[fx.Node], lines: list[str], marks: dict[fx.Node, list[str]]) -> Iterator[str]:
    """The lines of all nodes, with a heading where another module begins."""
    path = None
    for node, line in zip(nodes, lines, strict=True):
        if node.op not in ("placeholder", "output") and module_path(node) != path:
            path = module_path(node)
            yield f"\n# {path or '(root)'}"
        for mark in marks.get(node, ()):
            yield f"# >>> {mark}"
        yield line


def _node_line(node: fx.Node) -> str:
    """A node as a line of Python, near enough."""
    value = value_of(node)
    kind = ""
    if isinstance(value, torch.Tensor):
        kind = f": {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    elif isinstance(value, torch.SymInt):
        kind = f": int {value}"
    if node.op == "placeholder":
        return f"{node.name}{kind}  # input"
    if node.op == "output":
        return f"return {node.args[0]!r}"
    if node.op == "get_attr":
        return f"{node.name}{kind} = self.{node.target}"
    args = list(map(repr, node.args))
    called = _target(node.target)
    if node.op == "call_method" and args:
        called = f"{args.pop(0)}.{called}"
    args += [f"{name}={value!r}" for name, value in node.kwargs.items()]
    return f"{node.name}{kind} = {called}({', '.join(args)})"


def _target(target: Any) -> str:
    """Name of what a node calls."""
    if isinstance(target, str | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target)
    module = getattr(target, "__module__", None)
    return ".".join(filter(None, (module, getattr(target, "__name__", str(target)))))
